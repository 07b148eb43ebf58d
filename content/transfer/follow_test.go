package transfer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// gate lets a source send what lies below a limit; requests beyond wait. Nothing is under way when the limit is reached,
// so that bytes can be counted exactly.
type gate struct {
	mu      sync.Mutex
	limit   int64
	changed chan struct{}
}

func newGate(limit int64) *gate { return &gate{limit: limit, changed: make(chan struct{})} }

func (g *gate) open(limit int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.limit = limit
	close(g.changed)
	g.changed = make(chan struct{})
}

func (g *gate) wait(ctx context.Context, off int64) error {
	for {
		g.mu.Lock()
		limit, changed := g.limit, g.changed
		g.mu.Unlock()
		if off < limit {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (g *gate) reply(ctx context.Context, _ int, off, _ int64) (fakeReply, error) {
	return fakeReply{}, g.wait(ctx, off)
}

// chunks of 1 MiB from one host whose requests end at gates of whole MiB. The first request says that ranges work.
var lockOptions = Options{ChunkSize: 1 << 20, ConnectionsPerHost: 2, Stall: time.Hour, FirstContact: time.Hour, GiveUp: time.Hour, NewHash: sha256.New}

func stuckAfter(d time.Duration) Options {
	o := lockOptions
	o.GiveUp = d
	return o
}

func sentBy(srcs ...*fakeSource) (n int64) {
	for _, s := range srcs {
		_, sent := s.stats()
		n += sent
	}
	return n
}

func frontierOf(t *testing.T, h *Handle, want int64) {
	t.Helper()
	eventually(t, "the frontier", func() bool { return h.Frontier() >= want })
	if got := h.Frontier(); got != want {
		t.Fatalf("frontier %d, want %d", got, want)
	}
}

// readPart reads [0, n) through one buffer, as an unpack does.
func readPart(t *testing.T, h *Handle, n int64) []byte {
	t.Helper()
	out := make([]byte, 0, n)
	for int64(len(out)) < n {
		buf := make([]byte, min(300<<10, n-int64(len(out))))
		m, err := h.ReadAt(t.Context(), buf, int64(len(out)))
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, buf[:m]...)
	}
	return out
}

func complete(t *testing.T, h *Handle, data []byte) {
	t.Helper()
	if got, err := readAll(t, h); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	wait(t, h)
	path := filepath.Join(t.TempDir(), "blob")
	if err := h.LinkTo(path); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, data) {
		t.Fatalf("the link reads %d bytes, %v", len(got), err)
	}
}

// TestFollow reads through a waiting manager what another one fetches.
func TestFollow(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(1, 6<<20+99)
	root := t.TempDir()
	m1, m2 := newManager(t, root, lockOptions), newManager(t, root, lockOptions)
	g := newGate(2 << 20)
	one, two := &fakeSource{host: "a", data: data, reply: g.reply}, &fakeSource{host: "a", data: data}
	h1 := join(t, m1, b, one)
	frontierOf(t, h1, 2<<20)
	h2 := join(t, m2, b, two)
	for limit := int64(2 << 20); limit < b.Size; limit += 1 << 20 {
		g.open(limit)
		frontierOf(t, h2, limit)
		if s := m2.List()[0]; s.Phase != PhaseLock || s.Frontier != limit || s.Received != limit {
			t.Fatalf("status at %d: %+v", limit, s)
		}
		if !bytes.Equal(readPart(t, h2, limit), data[:limit]) {
			t.Fatal("read something else")
		}
	}
	g.open(b.Size)
	complete(t, h2, data)
	complete(t, h1, data)
	if one, two := sentBy(one), sentBy(two); one != b.Size || two != 0 {
		t.Errorf("sent %d and %d of %d bytes", one, two, b.Size)
	}
	if h2.job.digest.Hash != nil {
		t.Error("the hash's buffer outlives the transfer")
	}
}

// TestFollowerTakesOver has the holder end twice; each time the next one goes on, and its reader notices nothing.
func TestFollowerTakesOver(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(2, 9<<20+1)
	root := t.TempDir()
	var srcs []*fakeSource
	before := newManager(t, root, lockOptions)
	for i := range int64(3) {
		src := &fakeSource{host: "a", data: data, reply: newGate((i + 1) * 3 << 20).reply}
		srcs = append(srcs, src)
		if i == 0 {
			frontierOf(t, join(t, before, b, src), 3<<20)
			continue
		}
		if i == 2 {
			src.reply = nil
		}
		m := newManager(t, root, lockOptions)
		h := join(t, m, b, src)
		frontierOf(t, h, i*3<<20)
		if got := readPart(t, h, i*3<<20); !bytes.Equal(got, data[:i*3<<20]) {
			t.Fatal("read something else")
		}
		done := make(chan struct{})
		var wg sync.WaitGroup
		wg.Go(func() { neverFalls(t, h, done) })
		if err := before.Close(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the next one goes on", func() bool { return h.Frontier() >= min((i+1)*3<<20, b.Size) })
		close(done)
		wg.Wait()
		if h.job.currentGeneration() != 0 {
			t.Error("readers had to start again")
		}
		if i == 2 {
			complete(t, h, data)
		}
		before = m
	}
	if n := sentBy(srcs...); n != b.Size {
		t.Errorf("sent %d bytes, want %d", n, b.Size)
	}
}

func neverFalls(t *testing.T, h *Handle, done <-chan struct{}) {
	for low := int64(0); ; {
		f := h.Frontier()
		if f < low {
			t.Errorf("the frontier fell from %d to %d", low, f)
			return
		}
		low = f
		select {
		case <-done:
			return
		default:
			runtime.Gosched()
		}
	}
}

// TestFollowPartialBlock follows up to bytes inside a block, which only a holder that stopped in order records.
func TestFollowPartialBlock(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(3, 3<<20)
	root := t.TempDir()
	const cut = 700_003
	m1 := newManager(t, root, lockOptions)
	g := newGate(0)
	src := &fakeSource{host: "a", data: data, reply: func(ctx context.Context, call int, off, _ int64) (fakeReply, error) {
		if call > 1 {
			return fakeReply{}, g.wait(ctx, off)
		}
		return fakeReply{cut: cut}, nil
	}}
	h1 := join(t, m1, b, src)
	frontierOf(t, h1, cut)
	if err := m1.Close(); err != nil {
		t.Fatal(err)
	}
	m2, m3 := newManager(t, root, lockOptions), newManager(t, root, lockOptions)
	h2 := join(t, m2, b, src)
	frontierOf(t, h2, cut)
	h3 := join(t, m3, b)
	frontierOf(t, h3, cut)
	if !bytes.Equal(readPart(t, h3, cut), data[:cut]) {
		t.Fatal("read something else")
	}
	g.open(1 << 20) // some chunks further: the block goes on where it was
	eventually(t, "followed beyond the block", func() bool { return h3.Frontier() >= 1<<20 })
	g.open(b.Size)
	complete(t, h3, data)
	complete(t, h2, data)
	if n := sentBy(src); n != b.Size {
		t.Errorf("sent %d bytes, want %d", n, b.Size)
	}
}

// TestFollowChecks follows a holder that resumes from a state file whose data was lost in part.
func TestFollowChecks(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(4, 4<<20)
	root := t.TempDir()
	m := newManager(t, root, lockOptions)
	h := join(t, m, b, &fakeSource{host: "a", data: data, reply: newGate(2 << 20).reply})
	frontierOf(t, h, 2<<20)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	damage(t, filepath.Dir(dataPath(m, b)), func(data, _ *os.File) error { return flipAt(data, 1<<20+5) })
	m1, m2 := newManager(t, root, lockOptions), newManager(t, root, lockOptions)
	g := newGate(0)
	src := &fakeSource{host: "a", data: data, reply: g.reply}
	h1 := join(t, m1, b, src)
	frontierOf(t, h1, 1<<20)
	h2 := join(t, m2, b)
	frontierOf(t, h2, 1<<20)
	g.open(b.Size)
	complete(t, h2, data)
	complete(t, h1, data)
	if n := sentBy(src); n != 2<<20+blockSize {
		t.Errorf("sent %d bytes, want %d", n, 2<<20+blockSize)
	}
}

// TestFollowRestart has the holder find a wrong digest: whoever read the wrong bytes elsewhere is told too.
func TestFollowRestart(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(5, 3<<20)
	root := t.TempDir()
	g := newGate(2 << 20)
	src := &fakeSource{host: "a", data: data, reply: func(ctx context.Context, call int, off, _ int64) (fakeReply, error) {
		return fakeReply{flip: call == 1}, g.wait(ctx, off)
	}}
	m1, m2 := newManager(t, root, lockOptions), newManager(t, root, lockOptions)
	h1 := join(t, m1, b, src)
	frontierOf(t, h1, 2<<20)
	h2 := join(t, m2, b)
	frontierOf(t, h2, 2<<20)
	if bytes.Equal(readPart(t, h2, 2<<20), data[:2<<20]) {
		t.Fatal("the bytes are not wrong")
	}
	g.open(b.Size)
	eventually(t, "told to start again", func() bool {
		_, err := h2.ReadAt(t.Context(), make([]byte, 1), 1<<20)
		return errors.Is(err, ErrRestarted)
	})
	complete(t, h2, data)
	complete(t, h1, data)
}

// TestStuckHolder has a holder that hangs: the one that waits goes on in a folder of its own, a third one follows that,
// and the first adopts it when it is awake again.
func TestStuckHolder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(6, 8<<20+7)
		root := t.TempDir()
		stuck, half := newGate(2<<20), newGate(5<<20)
		one := &fakeSource{host: "a", data: data, reply: stuck.reply}
		two := &fakeSource{host: "a", data: data, reply: half.reply}
		three := &fakeSource{host: "a", data: data}
		m1 := newManager(t, root, lockOptions)
		h1 := join(t, m1, b, one)
		frontierOf(t, h1, 2<<20)
		m2 := newManager(t, root, stuckAfter(5*time.Second))
		h2 := join(t, m2, b, two)
		if !bytes.Equal(readPart(t, h2, 2<<20), data[:2<<20]) {
			t.Fatal("read something else")
		}
		frontierOf(t, h2, 5<<20)
		if s := m2.List()[0]; s.Phase != PhaseFetching {
			t.Errorf("phase %s after the fallback", s.Phase)
		}
		m3 := newManager(t, root, lockOptions)
		h3 := join(t, m3, b, three)
		frontierOf(t, h3, 5<<20)
		half.open(b.Size)
		complete(t, h2, data)
		complete(t, h3, data)
		complete(t, h1, data) // found the other folder by itself
		if n := sentBy(one, two, three); n != b.Size {
			t.Errorf("sent %d bytes, want %d", n, b.Size)
		}
		for i, h := range []*Handle{h1, h2, h3} {
			if h.job.currentGeneration() != 0 {
				t.Errorf("readers of %d had to start again", i+1)
			}
			_ = h.Close()
		}
		names, err := filepath.Glob(filepath.Join(root, "sha256-*"))
		if err != nil || len(names) != 1 || filepath.Base(names[0]) != privateName(b, 1) {
			t.Errorf("left: %v, %v", names, err)
		}
		// Nobody has to fetch for a blob that lies in a private folder.
		m4 := newManager(t, root, lockOptions)
		h4 := join(t, m4, b)
		complete(t, h4, data)
		_ = h4.Close()
	})
}

// TestStuckHolderWakes has the holder that hung be faster in the end: the private folder goes.
func TestStuckHolderWakes(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(7, 6<<20)
		root := t.TempDir()
		first, second := newGate(2<<20), newGate(3<<20)
		one := &fakeSource{host: "a", data: data, reply: first.reply}
		two := &fakeSource{host: "a", data: data, reply: second.reply}
		m1, m2 := newManager(t, root, lockOptions), newManager(t, root, stuckAfter(5*time.Second))
		h1 := join(t, m1, b, one)
		frontierOf(t, h1, 2<<20)
		h2 := join(t, m2, b, two)
		frontierOf(t, h2, 3<<20)
		readPart(t, h2, 3<<20)
		first.open(b.Size)
		complete(t, h1, data)
		complete(t, h2, data)
		if n := sentBy(two); n != 1<<20 || h2.job.currentGeneration() != 0 {
			t.Errorf("the second fetched %d bytes, generation %d", n, h2.job.currentGeneration())
		}
		_, err := os.Stat(folderPath(root, privateName(b, 1)))
		_, lock := os.Stat(lockPath(root, privateName(b, 1)))
		if !errors.Is(err, fs.ErrNotExist) || !errors.Is(lock, fs.ErrNotExist) {
			t.Errorf("the private folder is left: %v %v", err, lock)
		}
	})
}

// TestStuckHolderOthersDiffer has two hosts that disagree: what readers had is not passed off as part of the right blob.
func TestStuckHolderOthersDiffer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(8, 4<<20)
		root := t.TempDir()
		m1, m2, m3 := newManager(t, root, lockOptions), newManager(t, root, stuckAfter(5*time.Second)), newManager(t, root, lockOptions)
		one := &fakeSource{host: "liar", data: data, reply: func(ctx context.Context, call int, off, _ int64) (fakeReply, error) {
			return fakeReply{flip: call == 1}, newGate(2<<20).wait(ctx, off)
		}}
		h1 := join(t, m1, b, one)
		frontierOf(t, h1, 2<<20)
		h3 := join(t, m3, b)
		readPart(t, h3, 2<<20)
		h2 := join(t, m2, b, &fakeSource{host: "a", data: data})
		wait(t, h2)
		for _, h := range []*Handle{h1, h3} {
			eventually(t, "adopted", func() bool { return h.job.status().Phase == PhaseComplete })
		}
		if err := h3.Wait(t.Context()); !errors.Is(err, ErrRestarted) {
			t.Errorf("a reader of wrong bytes got %v", err)
		}
		complete(t, h3, data)
		complete(t, h1, data)
	})
}

// TestStuckHolderNoSource has nobody to ask: the waiter fails, and what it followed stays readable.
func TestStuckHolderNoSource(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(9, 4<<20)
		root := t.TempDir()
		m1, m2 := newManager(t, root, lockOptions), newManager(t, root, stuckAfter(5*time.Second))
		h1 := join(t, m1, b, &fakeSource{host: "a", data: data, reply: newGate(2 << 20).reply})
		frontierOf(t, h1, 2<<20)
		h2 := join(t, m2, b)
		if err := h2.Wait(t.Context()); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no progress for 5s") {
			t.Fatal(err)
		}
		if !bytes.Equal(readPart(t, h2, 2<<20), data[:2<<20]) {
			t.Error("read something else")
		}
	})
}

// TestSlowHolder has a holder that takes longer than GiveUp for a block, and one that waits for its turn: neither is stuck.
func TestSlowHolder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(10, 1<<20)
		other, ob := randomBlob(11, 1<<20)
		root := t.TempDir()
		o := stuckAfter(10 * time.Second)
		o.MaxTransfers = 1
		m1, m2 := newManager(t, root, o), newManager(t, root, o)
		one, two := &fakeSource{host: "a", data: data}, &fakeSource{host: "a", data: data}
		one.reply = func(context.Context, int, int64, int64) (fakeReply, error) {
			return fakeReply{latency: 5 * time.Second}, nil
		}
		h1 := join(t, m1, b, one)
		eventually(t, "the first bytes", func() bool { return sentBy(one) > 0 })
		queued, spare := &fakeSource{host: "a", data: other}, &fakeSource{host: "a", data: other}
		h3 := join(t, m1, ob, queued)
		eventually(t, "the second is in line", func() bool { return h3.job.busy() })
		h2, h4 := join(t, m2, b, two), join(t, m2, ob, spare)
		for _, h := range []*Handle{h1, h2, h3, h4} {
			wait(t, h)
		}
		if n, m := sentBy(two), sentBy(spare); n != 0 || m != 0 {
			t.Errorf("fetched %d and %d bytes beside a slow holder", n, m)
		}
	})
}

// TestFullestFolder goes on in that folder of two that a crash left which has more.
func TestFullestFolder(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(12, 6<<20)
		root := t.TempDir()
		m1, m2 := newManager(t, root, lockOptions), newManager(t, root, stuckAfter(5*time.Second))
		h1 := join(t, m1, b, &fakeSource{host: "a", data: data, reply: newGate(2 << 20).reply})
		frontierOf(t, h1, 2<<20)
		h2 := join(t, m2, b, &fakeSource{host: "a", data: data, reply: newGate(5 << 20).reply})
		frontierOf(t, h2, 5<<20)
		if err := errors.Join(m1.Close(), m2.Close()); err != nil {
			t.Fatal(err)
		}
		src := &fakeSource{host: "a", data: data}
		m := newManager(t, root, lockOptions)
		h := join(t, m, b, src)
		complete(t, h, data)
		if n := sentBy(src); n != 1<<20 {
			t.Errorf("fetched %d bytes, want %d", n, 1<<20)
		}
		for _, h := range []*Handle{h, h1, h2} {
			_ = h.Close()
		}
		synctest.Wait()
		if err := m.Forget(b.Digest); err != nil {
			t.Fatal(err)
		}
		if left, err := filepath.Glob(filepath.Join(root, "sha256-*")); err != nil || len(left) != 1 {
			t.Errorf("left: %v %v", left, err)
		}
	})
}

// TestFollowContradiction has what was followed turn out wrong, or not to be vouched for: who read it is told, whether the
// holder is followed or relieved.
func TestFollowContradiction(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		act func(w *handWritten)
		run bool  // the holder goes on until the readers were told
		had int64 // bytes that need not be fetched
	}{
		"new state": {func(w *handWritten) {
			w.newState()
			for n := range uint32(3) {
				w.block(n, w.right(n))
			}
		}, true, 3 * blockSize},
		"new state of one that ended": {func(w *handWritten) {
			w.newState()
			w.block(0, w.right(0))
			w.block(1, w.right(1))
		}, false, 2 * blockSize},
		"other bytes for a block": {func(w *handWritten) { w.block(0, w.right(0)) }, true, 2 * blockSize},
		"records lost": {func(w *handWritten) {
			w.must(os.Truncate(filepath.Join(w.f.path, stateName), headerSize))
			w.block(1, w.right(1))
		}, false, blockSize},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(13, 3<<20)
			m := newManager(t, t.TempDir(), lockOptions)
			w := newHandWritten(t, m.root, folderName(m.root, b), data)
			w.block(0, bytes.Repeat([]byte("x"), blockSize))
			w.block(1, w.right(1))
			src := &fakeSource{host: "a", data: data}
			h := join(t, m, b, src)
			frontierOf(t, h, 2*blockSize)
			readPart(t, h, 2*blockSize)
			tc.act(w)
			if tc.run {
				eventually(t, "told to start again", func() bool {
					_, err := h.ReadAt(t.Context(), make([]byte, 1), 1)
					return errors.Is(err, ErrRestarted)
				})
			}
			w.end()
			if err := h.Wait(t.Context()); !errors.Is(err, ErrRestarted) {
				t.Errorf("wait: %v", err)
			}
			complete(t, h, data)
			if n := sentBy(src); n != b.Size-tc.had {
				t.Errorf("fetched %d bytes, want %d", n, b.Size-tc.had)
			}
		})
	}
}

// handWritten is a folder that the test itself holds.
type handWritten struct {
	t    *testing.T
	data []byte
	f    *folder
	hold *holding
}

func newHandWritten(t *testing.T, root, name string, data []byte) *handWritten {
	w := &handWritten{t: t, data: data}
	var err error
	w.hold, err = tryExclusive(root, name)
	w.must(err)
	w.f, err = openFolder(folderPath(root, name), blobOf(data), false)
	w.must(err)
	return w
}

func (w *handWritten) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *handWritten) right(n uint32) []byte { return w.data[n*blockSize : (n+1)*blockSize] }

func (w *handWritten) block(n uint32, p []byte) {
	_, err := w.f.data.WriteAt(p, int64(n)*blockSize)
	w.must(errors.Join(err, w.f.record(n, int64(len(p)), crc32.Checksum(p, castagnoli))))
}

// newState begins a new state file beside the same data, as after blocks that turned out wrong.
func (w *handWritten) newState() {
	path := filepath.Join(w.f.path, stateName)
	w.must(errors.Join(w.f.closeState(), os.Remove(path)))
	var err error
	w.f.state, err = createState(path, w.f.blob.Size, w.f.log.sum)
	w.must(err)
}

func (w *handWritten) end() {
	w.must(errors.Join(w.f.closeState(), w.f.data.Close(), w.hold.lock.Close()))
}

// TestStuckHolderRots has the holder's data change after it was followed: only what still matches its record is taken over.
func TestStuckHolderRots(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, b := randomBlob(14, 4<<20)
		root := t.TempDir()
		m1, m2 := newManager(t, root, lockOptions), newManager(t, root, stuckAfter(5*time.Second))
		h1 := join(t, m1, b, &fakeSource{host: "a", data: data, reply: newGate(2 << 20).reply})
		frontierOf(t, h1, 2<<20)
		src := &fakeSource{host: "a", data: data}
		h2 := join(t, m2, b, src)
		frontierOf(t, h2, 2<<20)
		damage(t, filepath.Dir(dataPath(m1, b)), func(data, _ *os.File) error { return flipAt(data, 1<<20) })
		wait(t, h2)
		complete(t, h2, data)
		if n := sentBy(src); n != 3<<20 || h2.job.currentGeneration() != 1 {
			t.Errorf("fetched %d bytes, generation %d", n, h2.job.currentGeneration())
		}
	})
}

// TestFinishedElsewhere has a job get the lock of an empty folder when another one is complete: it asks nobody.
func TestFinishedElsewhere(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(15, 2<<20)
	m := newManager(t, t.TempDir(), lockOptions)
	wait(t, join(t, m, b, &fakeSource{host: "a", data: data}))
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	root := copyRoot(t, m.root)
	main := folderName(root, b)
	if err := os.Rename(folderPath(root, main), folderPath(root, privateName(b, 2))); err != nil {
		t.Fatal(err)
	}
	j := newJob(root, b, lockOptions, m.shared)
	src := &fakeSource{host: "a", data: data}
	j.addSources([]Source{src})
	hold, err := tryExclusive(root, main)
	if err != nil {
		t.Fatal(err)
	}
	if err := j.runLocked(t.Context(), hold); err != nil {
		t.Fatal(err)
	}
	if calls, _ := src.stats(); calls != 0 || j.hold.name != privateName(b, 2) {
		t.Errorf("%d requests, holds %s", calls, j.hold.name)
	}
	if err := j.retire(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(lockPath(root, main)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the lock file of the dropped folder: %v", err)
	}
}
