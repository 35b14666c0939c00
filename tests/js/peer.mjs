// A js-libp2p peer for tests/interop: serves three protocols, and does on command what a test asks.
//
// It prints one JSON object a line: first {"peer", "address"}, then one answer for each command it
// reads. tests/interop/peers.py describes the commands; the peers in Go and Python know the same ones.

// Packages of js-libp2p want Node 22; this is all that Node 20 lacks.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((onResolve, onReject) => { resolve = onResolve; reject = onReject })
  return { promise, resolve, reject }
}

const { createInterface } = await import('node:readline')
const { randomBytes } = await import('node:crypto')
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { generateKeyPair } = await import('@libp2p/crypto/keys')
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { multiaddr } = await import('@multiformats/multiaddr')

const ECHO = '/swarmpy-test/echo/1'
const UPPER = '/swarmpy-test/upper/1'
const RESET = '/swarmpy-test/reset/1'
const STREAMS = { maxInboundStreams: 256, maxOutboundStreams: 256 }

const node = await createLibp2p({
  privateKey: await generateKeyPair(process.argv[2] ?? 'Ed25519'),
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  // By default it refuses the sixth connection a second from one host, and every test is on one host.
  connectionManager: { inboundConnectionThreshold: 1000 },
  services: { identify: identify(), ping: ping() }
})

const identified = new Map()
node.addEventListener('peer:identify', ({ detail }) => waiting(detail.peerId).resolve(detail))

function waiting (peer) {
  const key = peer.toString()
  if (!identified.has(key)) {
    identified.set(key, Promise.withResolvers())
  }
  return identified.get(key)
}

// Streams. js-libp2p's own iterator waits for ever where the other side's end came before it was asked
// for, so these listen themselves.

function ended (stream) {
  const { promise, resolve, reject } = Promise.withResolvers()
  stream.addEventListener('remoteCloseWrite', resolve)
  stream.addEventListener('close', ({ error }) => error == null ? resolve() : reject(error))
  if (stream.status === 'reset') {
    reject(new Error('the stream was reset'))
  } else if (stream.remoteWriteStatus === 'closed') {
    setTimeout(resolve, 0) // after what lies in the buffer was handed out
  }
  return promise
}

async function readAll (stream) {
  const received = []
  stream.addEventListener('message', ({ data }) => { received.push(Buffer.from(data.subarray())) })
  await ended(stream)
  return Buffer.concat(received)
}

async function send (stream, bytes) {
  if (!stream.send(bytes)) {
    await stream.onDrain()
  }
}

// What it serves.

await node.handle(ECHO, async stream => {
  let sent = Promise.resolve()
  stream.addEventListener('message', ({ data }) => { sent = sent.then(() => send(stream, data)) })
  await ended(stream)
  await sent
  await stream.close()
}, STREAMS)

await node.handle(UPPER, async stream => {
  const question = await readAll(stream)
  await send(stream, Buffer.from(question.toString().toUpperCase()))
  await stream.close()
}, STREAMS)

await node.handle(RESET, async stream => {
  await new Promise(resolve => { stream.addEventListener('message', resolve, { once: true }) })
  stream.abort(new Error('as the test wants it'))
}, STREAMS)

// What it does on command.

async function echo (connection, size) {
  const stream = await connection.newStream(ECHO, STREAMS)
  const sent = randomBytes(size)
  const received = readAll(stream)
  for (let start = 0; start < size; start += 65536) {
    await send(stream, sent.subarray(start, start + 65536))
  }
  await stream.close()
  if (!(await received).equals(sent)) {
    throw new Error(`echo of ${size} bytes came back different`)
  }
}

const commands = {
  async dial ({ address }) {
    const connection = await node.dial(multiaddr(address))
    return { peer: connection.remotePeer.toString() }
  },

  async identify (connection) {
    const { agentVersion, protocols, signedPeerRecord } = await waiting(connection.remotePeer).promise
    const addresses = (signedPeerRecord?.addresses ?? []).map(String)
    return { agent: agentVersion, protocols, record_addresses: addresses }
  },

  async ping (connection) {
    return { rtt_s: await node.services.ping.ping(connection.remotePeer) / 1000 }
  },

  async echo (connection, { sizes }) {
    for (const size of sizes) {
      await echo(connection, size)
    }
    return { echoed: sizes }
  },

  async parallel (connection, { count, size }) {
    await Promise.all(Array.from({ length: count }, () => echo(connection, size)))
    return { count }
  },

  async 'half-close' (connection, { text }) {
    const stream = await connection.newStream(UPPER, STREAMS)
    const received = readAll(stream)
    await send(stream, Buffer.from(text))
    await stream.close()
    return { answer: (await received).toString() }
  },

  async reset (connection) {
    const stream = await connection.newStream(RESET, STREAMS)
    const received = readAll(stream)
    await send(stream, Buffer.from('x'))
    const error = await received.then(() => null, error => error)
    return { was_reset: error?.name === 'StreamResetError' }
  }
}

async function obey (command) {
  if (command.do === 'dial') {
    return await commands.dial(command)
  }
  return await commands[command.do](await connectionTo(command.peer), command)
}

// The other end of a handshake may have seen it end before this one.
async function connectionTo (peer) {
  for (let attempt = 0; attempt < 1000; attempt++) {
    const connection = node.getConnections().find(item => item.remotePeer.toString() === peer)
    if (connection != null) {
      return connection
    }
    await new Promise(resolve => setTimeout(resolve, 10))
  }
  throw new Error(`${peer} is not connected`)
}

const print = object => console.log(JSON.stringify(object))
print({ peer: node.peerId.toString(), address: node.getMultiaddrs()[0].toString() })
for await (const line of createInterface({ input: process.stdin })) {
  print(await obey(JSON.parse(line)).catch(error => ({ error: String(error) })))
}
await node.stop()
