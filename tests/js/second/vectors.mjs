// Holds swarm.mjs to protocols/vectors: prints {"passed": how many, "failed": [what]}.

import { readFileSync } from 'node:fs'
import { deepStrictEqual, throws } from 'node:assert'
import * as swarm from './swarm.mjs'

const read = name => JSON.parse(readFileSync(new URL(`../../../protocols/vectors/${name}.json`, import.meta.url)))
const bytes = text => new Uint8Array(Buffer.from(text, 'hex'))
const hex = data => Buffer.from(data).toString('hex')
let passed = 0
const failed = []

function check (what, test) {
  try {
    test()
    passed++
  } catch (error) {
    failed.push(`${what}: ${error.message.slice(0, 300)}`)
  }
}

const refused = (what, test) => check(what, () => throws(test))

// Messages as the vectors' JSON has them: bytes as base64.
const plain = value => value instanceof Uint8Array
  ? Buffer.from(value).toString('base64')
  : Array.isArray(value)
    ? value.map(plain)
    : value && typeof value === 'object' ? Object.fromEntries(Object.entries(value).map(([k, v]) => [k, plain(v)])) : value

const ping = read('ping')
for (const { what, sent, received } of ping.valid) check(what, () => swarm.checkPong(bytes(sent), bytes(received)))
for (const { what, sent, received } of ping.invalid) refused(what, () => swarm.checkPong(bytes(sent), bytes(received)))

const envelope = read('envelope')
const open = data => swarm.openEnvelope(bytes(data), envelope.domain, bytes(envelope.type))
for (const { what, signer, payload, bytes: data } of envelope.valid) {
  check(what, () => deepStrictEqual([open(data).signer, hex(open(data).payload)], [signer, payload]))
}
for (const { what, bytes: data } of envelope.invalid) refused(what, () => open(data))

const invite = read('invite')
for (const known of invite.codes) {
  check('code', () => {
    const found = swarm.decodeInvite(known.code)
    deepStrictEqual(
      [hex(found.envelope), found.issuer, found.network, found.addresses, swarm.wordsOf(found.network)],
      [known.envelope, known.issuer, known.network_id, known.addresses, known.words]
    )
    deepStrictEqual('swarm://' + swarm.base32(found.envelope), known.code)
  })
}
for (const code of invite.equal) check('equal', () => deepStrictEqual(hex(swarm.decodeInvite(code).envelope), invite.codes[0].envelope))
for (const { what, code } of invite.later) check(what, () => swarm.decodeInvite(code))
for (const code of invite.malformed) refused('malformed', () => swarm.decodeInvite(code))
for (const { what, code } of invite.invalid) refused(what, () => swarm.decodeInvite(code))

const membership = read('membership')
for (const known of [...membership.memberships, ...membership.later]) {
  check('membership', () => {
    const found = swarm.verifyProof(known.proof.map(bytes), known.wall_s)
    deepStrictEqual([found.network, found.canInvite, found.notAfter], [known.network_id, known.can_invite, known.not_after_wall_s])
  })
}
for (const { why, proof, wall_s: wallS } of membership.refused) refused(why, () => swarm.verifyProof(proof.map(bytes), wallS))
const { network_id: network, role, channel_binding: binding, tag } = membership.tag
check('tag', () => deepStrictEqual(hex(swarm.networkTag(network, bytes(binding), role)), tag))

for (const [name, file] of Object.entries({ invite, membership })) {
  for (const { fields, bytes: data } of file.messages) {
    check(`${name} ${fields.type}`, () => {
      const found = swarm.decodeMessage(name, bytes(data))
      deepStrictEqual(plain(found), fields)
      deepStrictEqual(swarm.decodeMessage(name, swarm.encode(found)), found)
    })
  }
  for (const { what, bytes: data } of file.invalid_messages) refused(what, () => swarm.decodeMessage(name, bytes(data)))
}

console.log(JSON.stringify({ passed, failed }))
