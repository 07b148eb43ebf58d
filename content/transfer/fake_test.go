package transfer

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if root := os.Getenv(childRoot); root != "" {
		runChild(root)
		return
	}
	if dir := os.Getenv(ServeFolder); dir != "" {
		runServer(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

// fakeSource serves a blob from memory and counts what it sends. reply, if set, decides about each request.
type fakeSource struct {
	host  string
	tier  int
	data  []byte
	reply func(ctx context.Context, call int, off, n int64) (fakeReply, error)

	mu       sync.Mutex
	calls    int
	sent     int64
	ranges   []span
	open     int
	maxOpen  int
	inFlight func(delta int)
}

// fakeReply is how a request is answered. The zero value sends what was asked for.
type fakeReply struct {
	whole   bool          // ignore the range
	off, n  int64         // claim this instead, if n != 0
	cut     int64         // end the body after that many bytes, if > 0
	err     error         // with this error instead of io.EOF
	stall   bool          // hang instead of ending
	flip    bool          // one wrong byte
	flipAt  int           // there, default in the middle
	latency time.Duration // before each piece
	piece   int           // bytes at once, default 64 KiB

	pauseAt int64         // send so much,
	paused  chan struct{} // close this,
	after   chan struct{} // and go on when this is closed
	told    chan struct{} // closed a second after the first bytes
}

func (s *fakeSource) Host() string { return s.host }

func (s *fakeSource) Tier() int { return s.tier }

func (s *fakeSource) Open(ctx context.Context, off, n int64) (Body, error) {
	s.mu.Lock()
	s.calls++
	call := s.calls
	s.ranges = append(s.ranges, span{off: off, end: off + n})
	s.mu.Unlock()
	var r fakeReply
	if s.reply != nil {
		var err error
		if r, err = s.reply(ctx, call, off, n); err != nil {
			return Body{}, err
		}
	}
	if r.whole {
		off, n = 0, int64(len(s.data))
	}
	p := s.data[off : off+n]
	if r.flip {
		p = bytes.Clone(p)
		p[cmp.Or(r.flipAt, len(p)/2)] ^= 1
	}
	if r.cut > 0 {
		p = p[:min(r.cut, int64(len(p)))]
	}
	s.count(1)
	b := Body{ReadCloser: &fakeBody{ctx: ctx, src: s, rest: p, reply: r}, Off: off, N: n}
	if r.n != 0 {
		b.Off, b.N = r.off, r.n
	}
	return b, nil
}

func (s *fakeSource) count(d int) {
	s.mu.Lock()
	s.open += d
	s.maxOpen = max(s.maxOpen, s.open)
	f := s.inFlight
	s.mu.Unlock()
	if f != nil {
		f(d)
	}
}

func (s *fakeSource) stats() (calls int, sent int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls, s.sent
}

// fakeBody knows its request's context, as the body of an HTTP response does.
type fakeBody struct {
	ctx   context.Context //nolint:containedctx // see above
	src   *fakeSource
	rest  []byte
	reply fakeReply
	once  sync.Once
}

func (b *fakeBody) Read(p []byte) (int, error) {
	if b.ctx.Err() != nil {
		return 0, context.Cause(b.ctx)
	}
	if len(b.rest) == 0 {
		if b.reply.stall {
			<-b.ctx.Done()
			return 0, context.Cause(b.ctx)
		}
		if b.reply.err != nil {
			return 0, b.reply.err
		}
		return 0, io.EOF
	}
	if err := b.pause(); err != nil {
		return 0, err
	}
	if b.reply.latency > 0 {
		if err := sleep(b.ctx, b.reply.latency); err != nil {
			return 0, err
		}
	}
	n := copy(p[:min(len(p), cmp.Or(b.reply.piece, 64<<10))], b.rest)
	b.rest = b.rest[n:]
	b.src.mu.Lock()
	b.src.sent += int64(n)
	b.src.mu.Unlock()
	return n, nil
}

// pause waits where the reply says so.
func (b *fakeBody) pause() error {
	if b.reply.after == nil || int64(len(b.src.data)-len(b.rest)) < b.reply.pauseAt {
		return nil
	}
	after := b.reply.after
	b.reply.after = nil
	if b.reply.paused != nil {
		if err := sleep(b.ctx, time.Second); err != nil { // what was sent is hashed
			return err
		}
		close(b.reply.paused)
	}
	select {
	case <-after:
	case <-b.ctx.Done():
		return context.Cause(b.ctx)
	}
	if b.reply.told != nil {
		told := b.reply.told
		time.AfterFunc(time.Second, func() { close(told) })
	}
	return nil
}

func (b *fakeBody) Close() error {
	b.once.Do(func() { b.src.count(-1) })
	return nil
}

func randomBlob(seed byte, size int) ([]byte, Blob) {
	p := make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{seed}).Read(p)
	return p, blobOf(p)
}

func blobOf(p []byte) Blob { return Blob{Digest: digest.FromBytes(p), Size: int64(len(p))} }

func newManager(t testing.TB, root string, o Options) *Manager {
	t.Helper()
	m, err := New(root, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func join(t testing.TB, m *Manager, b Blob, srcs ...Source) *Handle {
	t.Helper()
	h, err := m.Join(t.Context(), "", b, srcs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h
}

func wait(t testing.TB, h *Handle) {
	t.Helper()
	if err := h.Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func readAll(t testing.TB, h *Handle) ([]byte, error) {
	t.Helper()
	var out []byte
	buf := make([]byte, 100<<10)
	for {
		n, err := h.ReadAt(t.Context(), buf, int64(len(out)))
		out = append(out, buf[:n]...)
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
	}
}

func dataPath(m *Manager, b Blob) string {
	return filepath.Join(m.root, folderName(m.root, b), dataName)
}

// copyRoot copies a transfer root as a crash would leave it for the next process.
func copyRoot(t testing.TB, root string) string {
	t.Helper()
	dst := t.TempDir()
	if err := os.CopyFS(dst, os.DirFS(root)); err != nil {
		t.Fatal(err)
	}
	return dst
}

// eventually waits for a condition that another goroutine brings about.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for range 2000 {
		if ok() {
			return
		}
		if sleep(t.Context(), 5*time.Millisecond) != nil {
			break
		}
	}
	t.Fatalf("never happened: %s", what)
}
