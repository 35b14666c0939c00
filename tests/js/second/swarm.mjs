// swarmpy's ping, invite and membership, written from protocols/*.md alone: a second opinion on whether the
// pages say enough. Pure functions of bytes; main.mjs speaks them over js-libp2p.

import { createHash, createHmac, createPublicKey, scryptSync, verify } from 'node:crypto'

export const PING_BYTES = 32 // ping.md
const MESSAGE_BYTES_MAX = 65536 // README.md
const ENVELOPE_BYTES_MAX = 16 * 1024 // envelope.md
const CODE_CHARACTERS_MAX = 2048, INVITE_BYTES_MAX = 1024, WORDS = 4, WORD_BITS = 11 // invite.md
const CHAIN_MAX = 8, NETWORKS_MAX = 8, NAME_MAX = 64, RECORD_BYTES_MAX = 640 // membership.md
const VOUCHER_BYTES = 8, VOUCHERS_MAX = 16, REVOCATION_BYTES_MAX = 6 * 1024
const MEMBERSHIP_TTL_S = 30 * 86400, CLOCK_SKEW_S = 300
const TIME_END = 253402300800 // the year 10000; README.md
const NESTING_MAX = 32

const refuse = why => { throw new Error(why) }
const concat = parts => new Uint8Array(Buffer.concat(parts))
const equal = (a, b) => Buffer.compare(a, b) === 0
const utf8 = data => new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(data)

// Framing (README.md) ------------------------------------------------------------------------

export function encodeVarint (value) {
  const out = []
  for (; value > 0x7f; value = Math.floor(value / 128)) out.push(value % 128 + 128)
  return Uint8Array.from([...out, value])
}

// The value and the offset behind it; null while bytes are missing.
export function decodeVarint (data, offset = 0) {
  for (let value = 0, index = 0; index < 9; index++) {
    const byte = data[offset + index]
    if (byte === undefined) return null
    value += (byte % 128) * 128 ** index
    if (byte < 128) return byte || !index ? [value, offset + index + 1] : refuse('varint too long')
  }
  refuse('varint too long')
}

export const frame = payload => concat([encodeVarint(payload.length), payload])

export function frameSize (data) {
  const head = decodeVarint(data)
  return head && head[0] > MESSAGE_BYTES_MAX ? refuse('frame too large') : head
}

// MessagePack, as far as README.md asks: a float is kept apart from an int ------------------------

export function encode (value) {
  const sized = (small, sizes, length) => {
    if (small !== null && length < small[1]) return Uint8Array.of(small[0] + length)
    const width = sizes.findIndex((tag, index) => tag && length < 256 ** 2 ** index)
    return Uint8Array.of(sizes[width], ...new Uint8Array(bigEndian(length, 2 ** width)))
  }
  if (value === null || value === undefined) return Uint8Array.of(0xc0)
  if (typeof value === 'boolean') return Uint8Array.of(value ? 0xc3 : 0xc2)
  if (typeof value === 'number') return value < 128 ? Uint8Array.of(value) : sized(null, [0xcc, 0xcd, 0xce, 0xcf], value)
  if (typeof value === 'string') {
    const text = Buffer.from(value)
    return concat([sized([0xa0, 32], [0xd9, 0xda, 0xdb], text.length), text])
  }
  if (value instanceof Uint8Array) return concat([sized(null, [0xc4, 0xc5, 0xc6], value.length), value])
  if (Array.isArray(value)) return concat([sized([0x90, 16], [0, 0xdc, 0xdd], value.length), ...value.map(encode)])
  const pairs = Object.entries(value)
  return concat([sized([0x80, 16], [0, 0xde, 0xdf], pairs.length), ...pairs.flat().map(encode)])
}

const bigEndian = (value, width) =>
  Uint8Array.from({ length: width }, (_, index) => Math.floor(value / 256 ** (width - 1 - index)) % 256)

export function decode (data) {
  if (data.length > MESSAGE_BYTES_MAX) refuse('message too large')
  const view = new DataView(data.buffer, data.byteOffset, data.length)
  let offset = 0
  const take = size => offset + size > data.length ? refuse('cut off') : data.subarray(offset, offset += size)
  const uint = width => {
    take(width)
    const at = offset - width
    return width === 8 ? integer(view.getBigUint64(at)) : view['getUint' + width * 8](at)
  }
  const int = width => {
    take(width)
    const at = offset - width
    return width === 8 ? integer(view.getBigInt64(at)) : view['getInt' + width * 8](at)
  }
  const many = (count, depth, read) => depth > NESTING_MAX || count > data.length
    ? refuse('too deep or too long')
    : Array.from({ length: count }, read)
  const array = (count, depth) => many(count, depth, () => value(depth + 1))
  const map = (count, depth) => Object.assign(Object.create(null), Object.fromEntries(many(count, depth, () => {
    const key = value(depth + 1)
    return typeof key === 'string' ? [key, value(depth + 1)] : refuse('a key that is no text')
  })))
  function value (depth) {
    const tag = uint(1)
    if (tag < 0x80) return tag
    if (tag < 0x90) return map(tag - 0x80, depth)
    if (tag < 0xa0) return array(tag - 0x90, depth)
    if (tag < 0xc0) return utf8(take(tag - 0xa0))
    if (tag >= 0xe0) return tag - 256
    if (tag === 0xc0) return null
    if (tag === 0xc2 || tag === 0xc3) return tag === 0xc3
    if (tag <= 0xc6 && tag >= 0xc4) return take(uint(2 ** (tag - 0xc4)))
    if (tag <= 0xc9 && tag >= 0xc7) return { extension: take(uint(2 ** (tag - 0xc7)) + 1) }
    if (tag === 0xca || tag === 0xcb) return { float: take(tag === 0xca ? 4 : 8) }
    if (tag <= 0xcf && tag >= 0xcc) return uint(2 ** (tag - 0xcc))
    if (tag <= 0xd3 && tag >= 0xd0) return int(2 ** (tag - 0xd0))
    if (tag <= 0xd8 && tag >= 0xd4) return { extension: take(2 ** (tag - 0xd4) + 1) }
    if (tag <= 0xdb && tag >= 0xd9) return utf8(take(uint(2 ** (tag - 0xd9))))
    if (tag === 0xdc || tag === 0xdd) return array(uint(tag === 0xdc ? 2 : 4), depth)
    return tag === 0xde || tag === 0xdf ? map(uint(tag === 0xde ? 2 : 4), depth) : refuse('unknown tag')
  }
  const found = value(0)
  return offset === data.length ? found : refuse('more behind the message')
}

const integer = big => Number.isSafeInteger(Number(big)) ? Number(big) : big

// What a field may be. Each returns the value or refuses it.
const is = {
  text: most => value => typeof value === 'string' && [...value].length <= most ? value : refuse('not such a text'),
  name: value => /[\p{C}\p{Z}]/u.test(is.text(NAME_MAX)(value).replaceAll(' ', '')) ? refuse('not printable') : value,
  bytes: (least, most) => value => value instanceof Uint8Array && value.length >= least && value.length <= most
    ? value
    : refuse('not such bytes'),
  int: (least, below) => value => (Number.isInteger(value) || typeof value === 'bigint') && value >= least && value < below
    ? value
    : refuse('not such an int'),
  bool: value => typeof value === 'boolean' ? value : refuse('not a bool'),
  list: (least, most, each) => value => Array.isArray(value) && value.length >= least && value.length <= most
    ? value.map(each)
    : refuse('not such an array'),
  optional: (absent, check) => value => value === undefined ? absent : check(value),
  among: values => value => values.includes(value) ? value : refuse('not one of these')
}
const time = is.int(0, TIME_END)
const proof = is.list(1, CHAIN_MAX, is.bytes(0, RECORD_BYTES_MAX))

const elements = (data, checks, least = checks.length) => {
  const found = decode(data)
  if (!Array.isArray(found) || found.length < least) refuse('not such an array')
  return checks.map((check, index) => check(found[index]))
}

const MESSAGES = {
  invite: {
    redeem: { invite: is.bytes(0, INVITE_BYTES_MAX) },
    accepted: { proof },
    refused: { reason: is.among(['malformed', 'foreign', 'expired', 'used', 'busy', 'unable', 'revoked']), wall_s: time }
  },
  membership: {
    hello: { tags: is.list(0, NETWORKS_MAX, is.bytes(32, 32)) },
    proofs: { proofs: is.list(0, NETWORKS_MAX, proof) },
    done: { refusal: is.optional('', is.text(200)), revocation: is.optional(new Uint8Array(), is.bytes(0, REVOCATION_BYTES_MAX)) },
    renew: { proof },
    renewed: { proof },
    not_renewed: {}
  }
}

// One message of a protocol, "invite" or "membership".
export function decodeMessage (protocol, data) {
  const found = decode(data)
  const fields = Object.hasOwn(MESSAGES[protocol], found?.type) ? MESSAGES[protocol][found.type] : refuse('no such message')
  const checked = Object.entries(fields).map(([name, check]) => [name, check(found[name])])
  return { type: found.type, ...Object.fromEntries(checked) }
}

// Identity (identity.md) and envelope (envelope.md) ------------------------------------------------

const P = 2n ** 255n - 19n
const ORDER_8 = 2707385501144840649318225287225658788936804267575313519463743609750303402022n
const SMALL_ORDER_Y = [0n, 1n, P - 1n, ORDER_8, P - ORDER_8]
const KEY_PREFIX = Uint8Array.of(0x08, 0x01, 0x12, 0x20)
const SPKI_PREFIX = Buffer.from('302a300506032b6570032100', 'hex') // how Node wants an Ed25519 key
const BASE58 = '123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz'

const hexInt = data => BigInt('0x' + Buffer.from(data).toString('hex'))

export function peerIdOf (encodedKey) {
  let number = hexInt(encodedKey) + (0x24n << BigInt(encodedKey.length * 8))
  let text = ''
  for (; number; number /= 58n) text = BASE58[number % 58n] + text
  return '1' + text // for the leading zero byte
}

function checkPeerId (text) {
  if (text.length > 64) refuse('no peer id')
  let number = 0n
  for (const digit of text) number = number * 58n + BigInt(BASE58.includes(digit) ? BASE58.indexOf(digit) : refuse('no base58'))
  const hex = number.toString(16)
  if (/^1220[0-9a-f]{64}$/.test(hex) && text[0] === 'Q') return // the hash of a longer key
  if (/^250802122102|^250802122103/.test(hex) && hex.length === 76 && text[0] === '1') return // secp256k1
  const key = Buffer.from(hex.padStart(74, '0'), 'hex').subarray(1)
  if (peerIdOf(checkKey(key)) !== text) refuse('no peer id')
}

function checkKey (encoded) {
  if (encoded.length !== 36 || !equal(encoded.subarray(0, 4), KEY_PREFIX)) refuse('not an Ed25519 key')
  const y = hexInt(Buffer.from(encoded.subarray(4)).reverse()) & (2n ** 255n - 1n)
  return y >= P || SMALL_ORDER_Y.includes(y) ? refuse('not a sound key') : encoded
}

export function openEnvelope (data, domain, type) {
  if (data.length > ENVELOPE_BYTES_MAX) refuse('envelope too large')
  let offset = 0
  const [key, kind, payload, signature] = [1, 2, 3, 5].map(number => {
    const size = data[offset] === number * 8 + 2 ? decodeVarint(data, offset + 1) : refuse('not an envelope')
    if (!size || size[1] + size[0] > data.length) refuse('cut off')
    offset = size[1] + size[0]
    return data.subarray(size[1], offset)
  })
  if (offset !== data.length || !equal(kind, Buffer.from(type))) refuse('not this envelope')
  checkKey(key)
  const signed = concat([Buffer.from(domain), kind, payload].map(frame))
  const publicKey = createPublicKey({ key: concat([SPKI_PREFIX, key.subarray(4)]), format: 'der', type: 'spki' })
  return verify(null, signed, publicKey, signature) ? { key, payload, signer: peerIdOf(key) } : refuse('bad signature')
}

// Invite (invite.md) -------------------------------------------------------------------------------

const BASE32 = 'abcdefghijklmnopqrstuvwxyz234567'

export function base32 (data) {
  const bits = [...data].map(byte => byte.toString(2).padStart(8, '0')).join('')
  return (bits.match(/.{1,5}/g) ?? []).map(five => BASE32[parseInt(five.padEnd(5, '0'), 2)]).join('')
}

function fromBase32 (text) {
  const bits = [...text].map(digit => BASE32.indexOf(digit).toString(2).padStart(5, '0')).join('')
  const data = Uint8Array.from((bits.match(/.{8}/g) ?? []).map(byte => parseInt(byte, 2)))
  return base32(data) === text ? data : refuse('not canonical base32')
}

export const networkId = hash => 'n' + base32(hash)

export function decodeInvite (code) {
  const text = [...code].length > CODE_CHARACTERS_MAX ? refuse('code too long') : code.replace(/\s/g, '').toLowerCase()
  const envelope = fromBase32(/^swarm:\/\/([a-z2-7]*)$/.exec(text)?.[1] ?? refuse('no code'))
  if (envelope.length > INVITE_BYTES_MAX) refuse('invite too large')
  const { payload, signer } = openEnvelope(envelope, 'swarmpy-invite', 'i')
  const [, network, networkName, issuerName, addresses, token, expires, canInvite, uses] = elements(payload, [
    is.among([1]), is.bytes(20, 20), is.name, is.name, is.list(0, 8, address), is.bytes(16, 16), time, is.bool, is.int(1, 101)
  ])
  return { envelope, issuer: signer, network: networkId(network), networkName, issuerName, addresses, token, expires, canInvite, uses }
}

function address (data) {
  const [code, size] = is.bytes(1, 64)(data)[0] === 4 ? ['ip4', 4] : data[0] === 41 ? ['ip6', 16] : refuse('not an IP')
  if (data.length !== size + 4 || data[size + 1] !== 6) refuse('not an IP and a TCP port')
  const ip = data.subarray(1, size + 1), port = data[size + 2] * 256 + data[size + 3]
  const multicast = code === 'ip4' ? ip[0] >> 4 === 14 : ip[0] === 255
  const mapped = code === 'ip6' && Buffer.from(ip).toString('hex').startsWith('0'.repeat(20) + 'ffff')
  if (!port || multicast || mapped || ip.every(byte => byte === 0)) refuse('no address to dial')
  const groups = Buffer.from(ip).toString('hex').match(/.{4}/g).join(':')
  return `/${code}/${code === 'ip4' ? ip.join('.') : new URL(`http://[${groups}]`).hostname.slice(1, -1)}/tcp/${port}`
}

export function wordsOf (network) {
  const hash = fromBase32(network.slice(1))
  const bits = hexInt(scryptSync(hash, 'swarmpy-words', 6, { N: 2 ** 15, r: 8, p: 1, maxmem: 2 ** 26 })) >> 4n
  return Array.from({ length: WORDS }, (_, index) => {
    const number = Number(bits >> BigInt(WORD_BITS * (WORDS - 1 - index)) & 2047n)
    const first = Math.floor(number / 32), last = number % 32
    return 'bdfghjklmnprstvz'[first >> 2] + 'aeio'[first & 3] + 'lmnrstxv'[last >> 2] + ['a', 'en', 'ik', 'o'][last & 3]
  })
}

// Membership (membership.md) -------------------------------------------------------------------------

export const networkTag = (network, binding, role = 'initiator') =>
  new Uint8Array(createHmac('sha256', network).update(`swarmpy-membership\0${role}\0`).update(binding).digest())

export function verifyProof (records, wallS, expectedMember) {
  let before = null, end = Infinity, vouched = 0
  for (const sealed of proof(records)) {
    const { key, payload, signer } = openEnvelope(sealed, 'swarmpy-membership', 'm')
    const [, network, name, member, canInvite, , issued, notAfter, vouchers] = elements(payload, [
      is.among([1]), is.bytes(20, 20), is.name, is.text(64), is.bool, is.int(0, 2n ** 62n), time, time,
      is.optional(new Uint8Array(), is.bytes(0, VOUCHER_BYTES * VOUCHERS_MAX))
    ], 8)
    checkPeerId(member)
    vouched += vouchers.length
    if (vouchers.length % VOUCHER_BYTES || vouched > VOUCHER_BYTES * VOUCHERS_MAX) refuse('not such vouchers')
    const issuer = before?.member ?? peerIdOf(key)
    const hash = before?.hash ?? createHash('sha256').update(key.subarray(4)).digest().subarray(0, 20)
    if (!equal(network, hash) || signer !== issuer || before?.canInvite === false) refuse('the chain does not hold')
    if (notAfter <= issued || notAfter - issued > MEMBERSHIP_TTL_S) refuse('lives too long')
    if (wallS < issued - CLOCK_SKEW_S || wallS > notAfter + CLOCK_SKEW_S) refuse('not valid now')
    end = Math.min(end, notAfter)
    before = { hash, member, canInvite, name: before?.name ?? name }
  }
  if (expectedMember !== undefined && before.member !== expectedMember) refuse("somebody else's membership")
  return { network: networkId(before.hash), name: before.name, member: before.member, canInvite: before.canInvite, notAfter: end }
}

// Ping (ping.md) ---------------------------------------------------------------------------------------

export const checkPong = (sent, received) => equal(sent, received) || refuse('another answer')
