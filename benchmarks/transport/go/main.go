// A go-libp2p peer for benchmarks/bench_transport.py: TCP, Noise and Yamux.
//
// It speaks the lines and the load of ../workload.py. Built when the benchmark runs.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"github.com/libp2p/go-libp2p/p2p/muxer/yamux"
	"github.com/libp2p/go-libp2p/p2p/security/noise"
	"github.com/libp2p/go-libp2p/p2p/transport/tcp"
)

const (
	load       = protocol.ID("/swarmpy-bench/load/1")
	writeBytes = 1 << 20
	openBytes  = 64
)

type command struct {
	Do         string
	Address    string
	Size       int
	Count      int
	Streams    int
	SecondsMax float64 `json:"seconds_max"`
}

// loader makes the load: one host, and the peer it dialled.
type loader struct {
	host   host.Host
	remote peer.ID
}

func main() {
	served, err := newHost("/ip4/" + os.Args[1] + "/tcp/0")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	served.SetStreamHandler(load, serve)
	made := &loader{host: served}
	printed := json.NewEncoder(os.Stdout)
	address := fmt.Sprintf("%s/p2p/%s", served.Addrs()[0], served.ID())
	printed.Encode(map[string]any{"address": address, "version": "go-libp2p " + version()})
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		value, err := made.obey(lines.Bytes())
		if err != nil {
			printed.Encode(map[string]any{"error": err.Error()})
			continue
		}
		printed.Encode(map[string]any{"value": value})
	}
}

// newHost listens on an address, or nowhere if it is empty.
func newHost(address string) (host.Host, error) {
	listen := libp2p.NoListenAddrs
	if address != "" {
		listen = libp2p.ListenAddrStrings(address)
	}
	return libp2p.New(
		listen,
		libp2p.Transport(tcp.NewTCPTransport),
		libp2p.Security(noise.ID, noise.New),
		libp2p.Muxer(yamux.ID, yamux.DefaultTransport),
		libp2p.ResourceManager(&network.NullResourceManager{}),
		libp2p.DisableRelay(),
	)
}

func version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, module := range info.Deps {
			if module.Path == "github.com/libp2p/go-libp2p" {
				return module.Version
			}
		}
	}
	return "?"
}

// serve does what a stream's first bytes say.
func serve(stream network.Stream) {
	defer stream.Close()
	header := make([]byte, 9)
	if _, err := io.ReadFull(stream, header); err != nil {
		return
	}
	size := int64(binary.BigEndian.Uint64(header[1:]))
	if header[0] == 'S' {
		if _, err := io.CopyN(io.Discard, stream, size); err == nil {
			stream.Write([]byte("k"))
		}
		return
	}
	message := make([]byte, size)
	for {
		if _, err := io.ReadFull(stream, message); err != nil {
			return
		}
		if _, err := stream.Write(message); err != nil {
			return
		}
	}
}

func (l *loader) obey(line []byte) (any, error) {
	var asked command
	if err := json.Unmarshal(line, &asked); err != nil {
		return nil, err
	}
	limit := time.Duration(asked.SecondsMax * float64(time.Second))
	switch asked.Do {
	case "dial":
		info, err := peer.AddrInfoFromString(asked.Address)
		if err != nil {
			return nil, err
		}
		l.remote = info.ID
		return nil, l.host.Connect(context.Background(), *info)
	case "connect":
		return connect(asked.Address, asked.Count)
	case "rtt":
		return l.rtt(asked.Size, asked.Count, limit)
	case "bulk":
		return l.bulk(asked.Size)
	case "rps":
		return l.rps(asked.Streams, asked.Size, int64(asked.Count), limit)
	case "open":
		return l.opened(asked.Count)
	}
	return nil, fmt.Errorf("no such command: %s", asked.Do)
}

// connect dials from hosts that are new each time; Connect returns when identify is done.
func connect(address string, count int) ([]float64, error) {
	info, err := peer.AddrInfoFromString(address)
	if err != nil {
		return nil, err
	}
	took := []float64{}
	for range count {
		dialing, err := newHost("")
		if err != nil {
			return nil, err
		}
		began := time.Now()
		err = dialing.Connect(context.Background(), *info)
		took = append(took, milliseconds(began))
		dialing.Close()
		if err != nil {
			return nil, err
		}
	}
	return took, nil
}

func (l *loader) open() (network.Stream, error) {
	return l.host.NewStream(context.Background(), l.remote, load)
}

func begin(stream network.Stream, kind byte, size int) error {
	_, err := stream.Write(header(kind, size))
	return err
}

func header(kind byte, size int) []byte {
	return binary.BigEndian.AppendUint64([]byte{kind}, uint64(size))
}

// payload gives bytes that differ everywhere, so that a reply out of place is seen.
func payload(size int) []byte {
	made := make([]byte, 0, size+8)
	for index := uint64(0); len(made) < size; index++ {
		made = binary.BigEndian.AppendUint64(made, index)
	}
	return made[:size]
}

func milliseconds(since time.Time) float64 {
	return float64(time.Since(since).Nanoseconds()) / 1e6
}

func echo(stream network.Stream, sent, received []byte) error {
	if _, err := stream.Write(sent); err != nil {
		return err
	}
	_, err := io.ReadFull(stream, received)
	return err
}

func (l *loader) rtt(size, count int, limit time.Duration) ([]float64, error) {
	stream, err := l.open()
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	if err := begin(stream, 'E', size); err != nil {
		return nil, err
	}
	sent, received := payload(size), make([]byte, size)
	took := []float64{}
	started := time.Now()
	for number := -2; number < count; number++ {
		began := time.Now()
		if err := echo(stream, sent, received); err != nil {
			return nil, err
		}
		if number >= 0 {
			took = append(took, milliseconds(began))
		}
		if !bytes.Equal(sent, received) {
			return nil, fmt.Errorf("an echo of %d bytes came back different", size)
		}
		if time.Since(started) > limit && number >= 0 {
			break
		}
	}
	return took, nil
}

func (l *loader) bulk(size int) (float64, error) {
	stream, err := l.open()
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	if err := begin(stream, 'S', size); err != nil {
		return 0, err
	}
	data := payload(writeBytes)
	began := time.Now()
	for range size / writeBytes {
		if _, err := stream.Write(data); err != nil {
			return 0, err
		}
	}
	if _, err := io.ReadFull(stream, make([]byte, 1)); err != nil {
		return 0, err
	}
	return time.Since(began).Seconds(), nil
}

func (l *loader) rps(streams, size int, count int64, limit time.Duration) (float64, error) {
	opened := make([]network.Stream, streams)
	sent := payload(size)
	for index := range opened {
		stream, err := l.open()
		if err != nil {
			return 0, err
		}
		defer stream.Close()
		opened[index] = stream
		if err := begin(stream, 'E', size); err != nil {
			return 0, err
		}
		if err := echo(stream, sent, make([]byte, size)); err != nil {
			return 0, err
		}
	}
	var done atomic.Int64
	var working sync.WaitGroup
	failed := make(chan error, streams)
	began := time.Now()
	for _, stream := range opened {
		working.Add(1)
		go func() {
			defer working.Done()
			received := make([]byte, size)
			for done.Add(1) <= count && time.Since(began) < limit {
				if err := echo(stream, sent, received); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	working.Wait()
	took := time.Since(began)
	select {
	case err := <-failed:
		return 0, err
	default:
	}
	return float64(min(done.Load(), count)) / took.Seconds(), nil
}

func (l *loader) opened(count int) ([]float64, error) {
	first := append(header('E', openBytes), payload(openBytes)...)
	took := []float64{}
	for range count {
		began := time.Now()
		stream, err := l.open()
		if err != nil {
			return nil, err
		}
		if err := echo(stream, first, make([]byte, openBytes)); err != nil {
			return nil, err
		}
		took = append(took, milliseconds(began))
		stream.Close()
	}
	return took, nil
}
