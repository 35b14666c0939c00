// A go-libp2p peer for tests/interop: serves three protocols, and does on command what a test asks.
//
// It prints one JSON object a line: first {"peer", "address"}, then one answer for each command it
// reads. peers.py describes the commands; the peers in JavaScript and Python know the same ones.
// The host is put together from its parts, which keeps QUIC and WebRTC out of the build.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/event"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/core/record"
	"github.com/libp2p/go-libp2p/core/sec"
	blankhost "github.com/libp2p/go-libp2p/p2p/host/blank"
	"github.com/libp2p/go-libp2p/p2p/host/eventbus"
	"github.com/libp2p/go-libp2p/p2p/host/peerstore/pstoremem"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	"github.com/libp2p/go-libp2p/p2p/net/upgrader"
	"github.com/libp2p/go-libp2p/p2p/protocol/identify"
	"github.com/libp2p/go-libp2p/p2p/protocol/ping"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
	"github.com/multiformats/go-multiaddr"
)

const (
	echoProtocol  = protocol.ID("/swarmpy-test/echo/1")
	upperProtocol = protocol.ID("/swarmpy-test/upper/1")
	resetProtocol = protocol.ID("/swarmpy-test/reset/1")
)

type command struct {
	Do      string
	Address string
	Peer    string
	Sizes   []int
	Count   int
	Size    int
	Text    string
}

type answer map[string]any

// node is the peer with the parts of libp2p that it asks by name.
type node struct {
	*blankhost.BlankHost
	identify identify.IDService
	ping     *ping.PingService
	lock     sync.Mutex
	records  map[peer.ID]*record.Envelope
}

func main() {
	keyType := "Ed25519"
	if len(os.Args) > 1 {
		keyType = os.Args[1]
	}
	peer, err := newNode(keyType)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	printed := json.NewEncoder(os.Stdout)
	printed.Encode(answer{"peer": peer.ID().String(), "address": peer.Addrs()[0].String()})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		result, err := peer.obey(lines.Bytes())
		if err != nil {
			result = answer{"error": err.Error()}
		}
		printed.Encode(result)
	}
}

func newNode(keyType string) (*node, error) {
	key, err := newKey(keyType)
	if err != nil {
		return nil, err
	}
	id, err := peer.IDFromPrivateKey(key)
	if err != nil {
		return nil, err
	}
	book, err := pstoremem.NewPeerstore()
	if err != nil {
		return nil, err
	}
	book.AddPubKey(id, key.GetPublic())
	book.AddPrivKey(id, key)
	bus := eventbus.NewBus()
	network, err := swarm.NewSwarm(id, book, bus)
	if err != nil {
		return nil, err
	}
	if err := addTransport(network, key); err != nil {
		return nil, err
	}
	listen := multiaddr.StringCast("/ip4/127.0.0.1/tcp/0")
	if err := network.Listen(listen); err != nil {
		return nil, err
	}
	host := blankhost.NewBlankHost(network, blankhost.WithEventBus(bus))
	service, err := identify.NewIDService(host, identify.UserAgent("go-libp2p/interop"))
	if err != nil {
		return nil, err
	}
	completed, err := bus.Subscribe(new(event.EvtPeerIdentificationCompleted))
	if err != nil {
		return nil, err
	}
	host.SetStreamHandler(echoProtocol, serveEcho)
	host.SetStreamHandler(upperProtocol, serveUpper)
	host.SetStreamHandler(resetProtocol, serveReset)
	pings := ping.NewPingService(host)
	service.Start() // last: what it tells of is what is served now
	made := &node{BlankHost: host, identify: service, ping: pings, records: map[peer.ID]*record.Envelope{}}
	go made.keepRecords(completed)
	return made, nil
}

// keepRecords keeps the signed peer records, which the library checks and then forgets.
func (n *node) keepRecords(completed event.Subscription) {
	for item := range completed.Out() {
		identified := item.(event.EvtPeerIdentificationCompleted)
		n.lock.Lock()
		n.records[identified.Peer] = identified.SignedPeerRecord
		n.lock.Unlock()
	}
}

func (n *node) recordOf(remote peer.ID) *record.Envelope {
	n.lock.Lock()
	defer n.lock.Unlock()
	return n.records[remote]
}

func newKey(keyType string) (crypto.PrivKey, error) {
	kinds := map[string]int{
		"Ed25519": crypto.Ed25519, "RSA": crypto.RSA,
		"secp256k1": crypto.Secp256k1, "ECDSA": crypto.ECDSA,
	}
	kind, known := kinds[keyType]
	if !known {
		return nil, fmt.Errorf("no key type %q", keyType)
	}
	key, _, err := crypto.GenerateKeyPairWithReader(kind, 2048, rand.Reader)
	return key, err
}

func addTransport(network *swarm.Swarm, key crypto.PrivKey) error {
	muxers := []upgrader.StreamMuxer{{ID: yamux.ID, Muxer: yamux.DefaultTransport}}
	security, err := noise.New(noise.ID, key, muxers)
	if err != nil {
		return err
	}
	upgrade, err := upgrader.New([]sec.SecureTransport{security}, muxers, nil, nil, nil)
	if err != nil {
		return err
	}
	transport, err := tcp.NewTCPTransport(upgrade, nil, nil)
	if err != nil {
		return err
	}
	return network.AddTransport(transport)
}

// What it serves.

func serveEcho(stream network.Stream) {
	if _, err := io.Copy(stream, stream); err != nil {
		stream.Reset()
		return
	}
	stream.Close()
}

func serveUpper(stream network.Stream) {
	question, err := io.ReadAll(stream)
	if err != nil {
		stream.Reset()
		return
	}
	stream.Write(bytes.ToUpper(question))
	stream.Close()
}

func serveReset(stream network.Stream) {
	stream.Read(make([]byte, 1))
	stream.Reset()
}

// What it does on command.

func (n *node) obey(line []byte) (answer, error) {
	var asked command
	if err := json.Unmarshal(line, &asked); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if asked.Do == "dial" {
		return n.dial(ctx, asked.Address)
	}
	remote, err := peer.Decode(asked.Peer)
	if err != nil {
		return nil, err
	}
	if err := n.waitConnected(ctx, remote); err != nil {
		return nil, err
	}
	switch asked.Do {
	case "identify":
		return n.describe(ctx, remote)
	case "ping":
		result := <-n.ping.Ping(ctx, remote)
		return answer{"rtt_s": result.RTT.Seconds()}, result.Error
	case "echo":
		for _, size := range asked.Sizes {
			if err := n.echo(ctx, remote, size); err != nil {
				return nil, err
			}
		}
		return answer{"echoed": asked.Sizes}, nil
	case "parallel":
		return n.parallel(ctx, remote, asked.Count, asked.Size)
	case "half-close":
		return n.halfClose(ctx, remote, asked.Text)
	case "reset":
		return n.meetReset(ctx, remote)
	}
	return nil, fmt.Errorf("no command %q", asked.Do)
}

func (n *node) dial(ctx context.Context, address string) (answer, error) {
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return nil, err
	}
	if err := n.Connect(ctx, *info); err != nil {
		return nil, err
	}
	return answer{"peer": info.ID.String()}, nil
}

func (n *node) describe(ctx context.Context, remote peer.ID) (answer, error) {
	envelope := n.recordOf(remote)
	for envelope == nil {
		if err := pause(ctx); err != nil {
			return nil, err
		}
		envelope = n.recordOf(remote)
	}
	opened, err := envelope.Record()
	if err != nil {
		return nil, err
	}
	addresses := []string{}
	for _, address := range opened.(*peer.PeerRecord).Addrs {
		addresses = append(addresses, address.String())
	}
	agent, err := n.Peerstore().Get(remote, "AgentVersion")
	if err != nil {
		return nil, err
	}
	protocols, err := n.Peerstore().GetProtocols(remote)
	return answer{"agent": agent, "protocols": protocols, "record_addresses": addresses}, err
}

// waitConnected waits for the end of a handshake whose other end may have seen it already.
func (n *node) waitConnected(ctx context.Context, remote peer.ID) error {
	for n.Network().Connectedness(remote) != network.Connected {
		if err := pause(ctx); err != nil {
			return err
		}
	}
	return nil
}

func pause(ctx context.Context) error {
	select {
	case <-time.After(10 * time.Millisecond):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (n *node) echo(ctx context.Context, remote peer.ID, size int) error {
	stream, err := n.NewStream(ctx, remote, echoProtocol)
	if err != nil {
		return err
	}
	defer stream.Reset()
	sent := make([]byte, size)
	rand.Read(sent)
	writing := make(chan error, 1)
	go func() {
		if _, err := stream.Write(sent); err != nil {
			writing <- err
			return
		}
		writing <- stream.CloseWrite()
	}()
	received, err := io.ReadAll(stream)
	if err != nil {
		return err
	}
	if err := <-writing; err != nil {
		return err
	}
	if !bytes.Equal(sent, received) {
		return fmt.Errorf("echo of %d bytes came back different", size)
	}
	return nil
}

func (n *node) parallel(ctx context.Context, remote peer.ID, count, size int) (answer, error) {
	outcomes := make(chan error, count)
	for range count {
		go func() { outcomes <- n.echo(ctx, remote, size) }()
	}
	for range count {
		if err := <-outcomes; err != nil {
			return nil, err
		}
	}
	return answer{"count": count}, nil
}

func (n *node) halfClose(ctx context.Context, remote peer.ID, text string) (answer, error) {
	stream, err := n.NewStream(ctx, remote, upperProtocol)
	if err != nil {
		return nil, err
	}
	defer stream.Reset()
	if _, err := io.WriteString(stream, text); err != nil {
		return nil, err
	}
	if err := stream.CloseWrite(); err != nil {
		return nil, err
	}
	received, err := io.ReadAll(stream)
	return answer{"answer": string(received)}, err
}

func (n *node) meetReset(ctx context.Context, remote peer.ID) (answer, error) {
	stream, err := n.NewStream(ctx, remote, resetProtocol)
	if err != nil {
		return nil, err
	}
	if _, err := stream.Write([]byte("x")); err != nil {
		return nil, err
	}
	_, err = io.ReadAll(stream)
	return answer{"was_reset": errors.Is(err, network.ErrReset)}, nil
}
