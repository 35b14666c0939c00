// A js-libp2p peer for tests/net/test_interop_js.py: echoes, and dials on command.
//
// It prints one JSON object a line. First {"peer", "address"}; then, for each line of standard input
// that holds a multiaddr, what it found there: {"agent", "protocols", "ping_ms", "echoed"} or {"error"}.

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
const { identify } = await import('@libp2p/identify')
const { ping } = await import('@libp2p/ping')
const { multiaddr } = await import('@multiformats/multiaddr')

const ECHO = '/swarmpy-test/echo/1'
const SIZES = [64, 16 * 1024, 256 * 1024, 1024 * 1024]

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() }
})

async function send (stream, chunk) {
  if (!stream.send(chunk)) {
    await stream.onDrain()
  }
}

// js-libp2p's iterator waits for ever if the stream's end came before this handler was called, so the
// other side must not send its end before it saw an echo.
await node.handle(ECHO, async stream => {
  for await (const chunk of stream) {
    await send(stream, chunk)
  }
  await stream.close()
})

async function echo (connection, size) {
  const stream = await connection.newStream(ECHO)
  const sent = randomBytes(size)
  const received = []
  const reading = (async () => {
    for await (const chunk of stream) {
      received.push(Buffer.from(chunk.subarray()))
    }
  })()
  for (let start = 0; start < size; start += 65536) {
    await send(stream, sent.subarray(start, start + 65536))
  }
  await stream.close()
  await reading
  if (!Buffer.concat(received).equals(sent)) {
    throw new Error(`echo of ${size} bytes came back different`)
  }
  return size
}

async function visit (address) {
  const identified = Promise.withResolvers()
  node.addEventListener('peer:identify', event => identified.resolve(event.detail), { once: true })
  const connection = await node.dial(multiaddr(address))
  const { agentVersion, protocols, signedPeerRecord } = await identified.promise
  const pingMs = await node.services.ping.ping(connection.remotePeer)
  const echoed = []
  for (const size of SIZES) {
    echoed.push(await echo(connection, size))
  }
  return {
    agent: agentVersion,
    protocols,
    record_addresses: (signedPeerRecord?.addresses ?? []).map(String),
    ping_ms: pingMs,
    echoed
  }
}

const print = object => console.log(JSON.stringify(object))
print({ peer: node.peerId.toString(), address: node.getMultiaddrs()[0].toString() })
for await (const line of createInterface({ input: process.stdin })) {
  print(await visit(line).catch(error => ({ error: String(error) })))
}
await node.stop()
