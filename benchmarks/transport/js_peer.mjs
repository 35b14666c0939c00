// A js-libp2p peer for benchmarks/bench_transport.py: TCP, Noise and Yamux.
//
// It speaks the lines and the load of workload.py; the benchmark runs a copy of it beside the packages.

// Packages of js-libp2p want Node 22; this is all that Node 20 lacks.
Promise.withResolvers ??= function () {
  let resolve, reject
  const promise = new Promise((onResolve, onReject) => { resolve = onResolve; reject = onReject })
  return { promise, resolve, reject }
}

const { readFileSync } = await import('node:fs')
const { createInterface } = await import('node:readline')
const { createLibp2p } = await import('libp2p')
const { tcp } = await import('@libp2p/tcp')
const { noise } = await import('@chainsafe/libp2p-noise')
const { yamux } = await import('@chainsafe/libp2p-yamux')
const { identify } = await import('@libp2p/identify')
const { multiaddr } = await import('@multiformats/multiaddr')

const LOAD = '/swarmpy-bench/load/1'
const MANY = 10_000 // streams and dials: limits that the load would meet are lifted
const WRITE_BYTES = 1 << 20
const OPEN_BYTES = 64

// Without listening addresses it only dials.
const createHost = listen => createLibp2p({
  addresses: { listen },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  connectionManager: { inboundConnectionThreshold: MANY },
  services: { identify: identify() }
})

// What came on a stream, in pieces of the size asked for.
class Channel {
  constructor (stream) {
    this.stream = stream
    this.pieces = stream[Symbol.asyncIterator]()
    this.rest = null
    this.message = Buffer.alloc(0) // for all messages of the channel, as the other peers do
  }

  async send (data) {
    for (let start = 0; start < data.length; start += WRITE_BYTES) {
      if (!this.stream.send(data.subarray(start, start + WRITE_BYTES))) {
        await this.stream.onDrain()
      }
    }
  }

  // The next piece of at most so many bytes, null at the end.
  async some (bytesMax) {
    let piece = this.rest
    this.rest = null
    if (piece === null) {
      const { done, value } = await this.pieces.next()
      if (done) return null
      piece = value.subarray()
    }
    if (piece.length > bytesMax) {
      this.rest = piece.subarray(bytesMax)
      piece = piece.subarray(0, bytesMax)
    }
    return piece
  }

  async receive (size) {
    const first = await this.some(size)
    if (first === null || first.length === size) return first
    if (this.message.length < size) this.message = Buffer.allocUnsafe(size)
    const message = this.message.subarray(0, size)
    message.set(first)
    for (let count = first.length; count < size;) {
      const piece = await this.some(size - count)
      if (piece === null) return null
      message.set(piece, count)
      count += piece.length
    }
    return message
  }

  async discard (size) {
    while (size > 0) {
      const piece = await this.some(size)
      if (piece === null) throw new Error('the stream ended')
      size -= piece.length
    }
  }
}

// Does what a stream's first bytes say.
async function serve (stream) {
  const channel = new Channel(stream)
  const header = await channel.receive(9)
  if (header === null) return
  const size = Number(Buffer.from(header).readBigUInt64BE(1))
  if (header[0] === 'S'.charCodeAt(0)) {
    await channel.discard(size)
    await channel.send(Buffer.from('k'))
  } else {
    for (let message; (message = await channel.receive(size)) !== null;) {
      await channel.send(message)
    }
  }
  await stream.close()
}

const payloads = new Map()

// Bytes that differ everywhere, so that a reply out of place is seen. Made once: it takes CPU.
function payload (size) {
  if (!payloads.has(size)) {
    const made = Buffer.alloc(Math.ceil(size / 8) * 8)
    for (let at = 0; at < size; at += 8) made.writeBigUInt64BE(BigInt(at / 8), at)
    payloads.set(size, made.subarray(0, size))
  }
  return payloads.get(size)
}

function header (kind, size) {
  const made = Buffer.alloc(9)
  made.write(kind, 0)
  made.writeBigUInt64BE(BigInt(size), 1)
  return made
}

async function connect (from, address) {
  const identified = Promise.withResolvers()
  from.addEventListener('peer:identify', () => identified.resolve(), { once: true })
  const connection = await from.dial(multiaddr(address))
  await identified.promise
  return connection
}

const host = await createHost([`/ip4/${process.argv[2]}/tcp/0`])
await host.handle(LOAD, stream => { serve(stream).catch(error => stream.abort(error)) }, {
  maxInboundStreams: MANY, maxOutboundStreams: MANY
})
let connection = null

const open = async () =>
  new Channel(await connection.newStream(LOAD, { maxOutboundStreams: MANY }))

async function echo (channel, sent) {
  await channel.send(sent)
  return await channel.receive(sent.length)
}

const COMMANDS = {
  async dial ({ address }) {
    connection = await connect(host, address)
  },

  async connect ({ address, count }) {
    const took = []
    for (let number = 0; number < count; number++) {
      const dialing = await createHost([])
      const began = performance.now()
      await connect(dialing, address)
      took.push(performance.now() - began)
      await dialing.stop()
    }
    return took
  },

  async rtt ({ size, count, seconds_max: secondsMax }) {
    const channel = await open()
    await channel.send(header('E', size))
    const sent = payload(size)
    const took = []
    const started = performance.now()
    for (let number = -2; number < count; number++) {
      const began = performance.now()
      const received = await echo(channel, sent)
      if (number >= 0) took.push(performance.now() - began)
      if (!sent.equals(received)) throw new Error(`an echo of ${size} bytes came back different`)
      if (number >= 0 && performance.now() - started > secondsMax * 1000) break
    }
    await channel.stream.close()
    return took
  },

  async bulk ({ size }) {
    const channel = await open()
    await channel.send(header('S', size))
    const data = payload(WRITE_BYTES)
    const began = performance.now()
    for (let sent = 0; sent < size; sent += WRITE_BYTES) await channel.send(data)
    await channel.receive(1)
    const took = (performance.now() - began) / 1000
    await channel.stream.close()
    return took
  },

  async rps ({ streams, size, count, seconds_max: secondsMax }) {
    const sent = payload(size)
    const channels = []
    for (let number = 0; number < streams; number++) {
      const channel = await open()
      await channel.send(header('E', size))
      await echo(channel, sent)
      channels.push(channel)
    }
    let done = 0
    const began = performance.now()
    await Promise.all(channels.map(async channel => {
      while (done < count && performance.now() - began < secondsMax * 1000) {
        done++
        await echo(channel, sent)
      }
    }))
    const took = (performance.now() - began) / 1000
    await Promise.all(channels.map(channel => channel.stream.close()))
    return done / took
  },

  async open ({ count }) {
    const first = Buffer.concat([header('E', OPEN_BYTES), payload(OPEN_BYTES)])
    const took = []
    for (let number = 0; number < count; number++) {
      const began = performance.now()
      const channel = await open()
      await channel.send(first)
      await channel.receive(OPEN_BYTES)
      took.push(performance.now() - began)
      await channel.stream.close()
    }
    return took
  }
}

const version = () => {
  const packageFile = new URL('node_modules/libp2p/package.json', import.meta.url)
  return `js-libp2p ${JSON.parse(readFileSync(packageFile)).version}, Node ${process.versions.node}`
}
const print = object => console.log(JSON.stringify(object))

print({ address: host.getMultiaddrs()[0].toString(), version: version() })
for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line)
  try {
    print({ value: await COMMANDS[command.do](command) ?? null })
  } catch (error) {
    print({ error: String(error) })
  }
}
await host.stop()
