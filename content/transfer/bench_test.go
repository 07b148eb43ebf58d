package transfer

import (
	"context"
	"io"
	"sync"
	"testing"
	"time"
)

// BenchmarkTransfer fetches a blob from memory: what is measured is storing, hashing and making durable.
func BenchmarkTransfer(b *testing.B) {
	data, blob := randomBlob(1, 256<<20)
	b.SetBytes(blob.Size)
	b.ReportAllocs()
	for b.Loop() {
		m := newManager(b, b.TempDir(), Options{})
		h := join(b, m, blob, &fakeSource{host: "a", data: data})
		wait(b, h)
		_ = h.Close()
		if err := m.Forget(blob.Digest); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkResume continues a blob whose last chunk is missing: recorded blocks are checked and hashed.
func BenchmarkResume(b *testing.B) {
	data, blob := randomBlob(1, 256<<20)
	root := b.TempDir()
	m := newManager(b, root, Options{})
	h := join(b, m, blob, &fakeSource{host: "a", data: data, reply: stopAfter(blob.Size - 8<<20)})
	if err := h.Wait(b.Context()); err == nil {
		b.Fatal("complete")
	}
	_ = h.Close()
	b.SetBytes(blob.Size)
	for b.Loop() {
		h := join(b, m, blob, &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{}, io.ErrNoProgress
		}})
		if _, err := h.ReadAt(b.Context(), make([]byte, 1), blob.Size-8<<20-1); err != nil {
			b.Fatal(err)
		}
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
		_ = h.Close()
		m = newManager(b, root, Options{})
	}
}

// BenchmarkCapped fetches an image of three layers, 0.9 GB, from a host that gives 25 MB/s to a connection and 250 MB/s
// to all, with 20 ms until the first byte: with connections that find their level, and with the eight that were fixed
// before. Reported is the time until the last byte in relation to bytes / 250 MB/s, and the most connections at once.
func BenchmarkCapped(b *testing.B) {
	const perConn, total, latency = 25e6, 250e6, 20 * time.Millisecond
	data, _ := randomBlob(1, 300e6)
	blobs := []Blob{blobOf(data), blobOf(data[1:]), blobOf(data[2:])}
	for name, limit := range map[string]int{"adaptive": 32, "fixed8": 8} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(900e6)
			most := 0
			var bytes time.Duration
			for b.Loop() {
				line := &cappedLine{perConn: perConn, total: total, latency: latency}
				m := newManager(b, b.TempDir(), Options{ConnectionsPerHost: limit})
				var handles []*Handle
				for i, blob := range blobs {
					handles = append(handles, join(b, m, blob, &cappedSource{line, data[i:]}))
				}
				var last time.Duration
				for _, h := range handles {
					wait(b, h)
					first, download, _ := h.Timings()
					last = max(last, first+download)
					_ = h.Close()
				}
				bytes += last
				for _, blob := range blobs {
					if err := m.Forget(blob.Digest); err != nil {
						b.Fatal(err)
					}
				}
				most = max(most, line.most)
			}
			b.ReportMetric(bytes.Seconds()/float64(b.N)/(900e6/total), "x-of-ideal")
			b.ReportMetric(float64(most), "connections")
		})
	}
}

// cappedLine is what the connections of a host share.
type cappedLine struct {
	perConn, total float64 // bytes a second
	latency        time.Duration

	mu         sync.Mutex
	free       time.Time // when the line has sent all that was asked of it
	open, most int
}

type cappedSource struct {
	line *cappedLine
	data []byte
}

func (s *cappedSource) Host() string { return "capped" }
func (s *cappedSource) Tier() int    { return 0 }

func (s *cappedSource) Open(ctx context.Context, off, n int64) (Body, error) {
	l := s.line
	l.mu.Lock()
	l.open++
	l.most = max(l.most, l.open)
	l.mu.Unlock()
	if err := sleep(ctx, l.latency); err != nil {
		return Body{}, err
	}
	return Body{ReadCloser: &cappedBody{ctx: ctx, line: l, rest: s.data[off : off+n], free: time.Now()}, Off: off, N: n}, nil
}

type cappedBody struct {
	ctx  context.Context //nolint:containedctx // as the body of an HTTP response does
	line *cappedLine
	rest []byte
	free time.Time // when this connection has sent all that was asked of it
}

func (b *cappedBody) Read(p []byte) (int, error) {
	if len(b.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(len(p), 32<<10)], b.rest)
	b.rest = b.rest[n:]
	now, l := time.Now(), b.line
	const slack = 20 * time.Millisecond // what buffers on the way hold
	after := func(free time.Time, rate float64) time.Time {
		return later(free, now.Add(-slack)).Add(time.Duration(float64(n) / rate * 1e9))
	}
	b.free = after(b.free, l.perConn)
	l.mu.Lock()
	l.free = after(l.free, l.total)
	until := later(l.free, b.free)
	l.mu.Unlock()
	return n, sleep(b.ctx, until.Sub(now))
}

func (b *cappedBody) Close() error {
	b.line.mu.Lock()
	defer b.line.mu.Unlock()
	b.line.open--
	return nil
}
