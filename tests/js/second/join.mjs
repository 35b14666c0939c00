// Joins a swarmpy network with an invite code: `node join.mjs CODE`. It prints {"words", "network"}, then, once it
// is a member to the issuer, {"peer", "network", "ping_ms"}, and stays connected until standard input ends.

// Packages of js-libp2p want Node 22; this is all that Node 20 lacks.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((onResolve, onReject) => { resolve = onResolve; reject = onReject })
  return { promise, resolve, reject }
}

const { randomBytes } = await import('node:crypto')
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise, pureJsCrypto } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { multiaddr } = await import('@multiformats/multiaddr')
const swarm = await import('./swarm.mjs')

const INVITE = '/swarmpy/invite/1', MEMBERSHIP = '/swarmpy/membership/1', PING = '/ipfs/ping/1.0.0'

// The channel binding (noise.md) is the handshake's last hash. js-libp2p keeps it to itself, but computes it with
// what it is given; there is one connection here, so the last hash is that of its handshake.
let channelBinding
const crypto = { ...pureJsCrypto, hashSHA256: data => { channelBinding = pureJsCrypto.hashSHA256(data); return channelBinding } }

const node = await createLibp2p({
  transports: [tcp()],
  connectionEncrypters: [noise({ crypto })],
  streamMuxers: [yamux()],
  services: { identify: identify() } // the other side asks for it
})

const print = object => console.log(JSON.stringify(object))

class Conversation {
  received = new Uint8Array(0)

  constructor (stream, protocol) {
    this.stream = stream
    this.protocol = protocol
    this.chunks = stream[Symbol.asyncIterator]()
  }

  async more () {
    const { value, done } = await this.chunks.next()
    if (done) throw new Error('the other side ended the stream')
    this.received = new Uint8Array(Buffer.concat([this.received, value.subarray()]))
  }

  async take (size) {
    while (this.received.length < size) await this.more()
    const taken = this.received.subarray(0, size)
    this.received = this.received.subarray(size)
    return taken
  }

  send (message) {
    this.stream.send(swarm.frame(swarm.encode(message)))
  }

  async receive (...types) {
    let head
    while ((head = swarm.frameSize(this.received)) === null) await this.more()
    await this.take(head[1])
    const message = swarm.decodeMessage(this.protocol, await this.take(head[0]))
    if (!types.includes(message.type)) throw new Error(`${message.type} where ${types} was expected`)
    return message
  }
}

async function ping (connection) {
  const stream = await connection.newStream(PING)
  const sent = randomBytes(swarm.PING_BYTES), started = performance.now()
  stream.send(sent)
  swarm.checkPong(sent, await new Conversation(stream).take(swarm.PING_BYTES))
  await stream.close()
  return performance.now() - started
}

async function redeem (connection, invite) {
  const conversation = new Conversation(await connection.newStream(INVITE), 'invite')
  conversation.send({ type: 'redeem', invite: invite.envelope })
  const answer = await conversation.receive('accepted', 'refused')
  await conversation.stream.close()
  if (answer.type === 'refused') throw new Error(`refused: ${answer.reason}`)
  const { network } = swarm.verifyProof(answer.proof, Date.now() / 1000, node.peerId.toString())
  if (network !== invite.network) throw new Error('a proof of another network')
  return answer.proof
}

async function becomeMember (connection, network, own) {
  const conversation = new Conversation(await connection.newStream(MEMBERSHIP), 'membership')
  conversation.send({ type: 'hello', tags: [swarm.networkTag(network, channelBinding)] })
  const [theirs] = (await conversation.receive('proofs')).proofs
  const { network: shown } = swarm.verifyProof(theirs, Date.now() / 1000, connection.remotePeer.toString())
  if (shown !== network) throw new Error('a membership of a network that was not named')
  conversation.send({ type: 'proofs', proofs: [own] })
  const { refusal } = await conversation.receive('done')
  await conversation.stream.close()
  if (refusal) throw new Error(`not a member: ${refusal}`)
}

try {
  const invite = swarm.decodeInvite(process.argv[2])
  print({ words: swarm.wordsOf(invite.network), network: invite.networkName })
  const connection = await node.dial(multiaddr(`${invite.addresses[0]}/p2p/${invite.issuer}`))
  const proof = await redeem(connection, invite)
  await becomeMember(connection, invite.network, proof)
  print({ peer: node.peerId.toString(), network: invite.network, ping_ms: await ping(connection) })
  for await (const chunk of process.stdin) chunk.fill(0)
} catch (error) {
  print({ error: String(error) })
}
await node.stop()
