package transfer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// stopAfter makes a source fail for good once it has sent some bytes, in several chunks.
func stopAfter(n int64) func(context.Context, int, int64, int64) (fakeReply, error) {
	return func(_ context.Context, _ int, off, _ int64) (fakeReply, error) {
		if off >= n {
			return fakeReply{}, errdefs.ErrPermissionDenied
		}
		return fakeReply{}, nil
	}
}

func TestResumeAfterClose(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	data, b := randomBlob(1, 16<<20+5)
	var sent int64
	for round := range 4 {
		m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 3})
		limit := int64(round+1) * 3 << 20
		src := &fakeSource{host: "a", data: data, reply: func(_ context.Context, _ int, off, _ int64) (fakeReply, error) {
			if off >= limit {
				return fakeReply{}, errdefs.ErrUnavailable
			}
			return fakeReply{cut: 700_003}, nil // ends inside a block
		}}
		h := join(t, m, b, src)
		eventually(t, "progress", func() bool { return h.Frontier() >= limit })
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		_ = h.Close()
		_, n := src.stats()
		sent += n
	}
	m := newManager(t, root, Options{})
	src := &fakeSource{host: "a", data: data}
	h := join(t, m, b, src)
	got, err := readAll(t, h)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	_, n := src.stats()
	if sent+n != b.Size {
		t.Errorf("sent %d bytes in five runs, want %d", sent+n, b.Size)
	}
}

func TestResumeAfterCrash(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(2, 8<<20+777)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20})
	h := join(t, m, b, &fakeSource{host: "a", data: data, reply: stopAfter(5 << 20)})
	if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	name := "sha256-" + b.Digest.Encoded()
	there := m.List()[0].Received
	if there < 5<<20 {
		t.Fatalf("only %d bytes are there", there)
	}
	for _, tc := range []struct {
		name   string
		damage func(data, state *os.File) error
		again  int64 // bytes fetched more than once, at most
	}{
		{"nothing", func(_, _ *os.File) error { return nil }, 0},
		{"one bad block", func(data, _ *os.File) error { return flipAt(data, 3*blockSize+17) }, blockSize},
		{"bad first and last block", func(data, _ *os.File) error {
			return errors.Join(flipAt(data, 0), flipAt(data, 5<<20-1))
		}, 2 * blockSize},
		{"data never reached the disk", func(data, _ *os.File) error { return data.Truncate(0) }, 1 << 30},
		{"half of the data", func(data, _ *os.File) error { return data.Truncate(2<<20 + 100) }, 3 << 20},
		{"torn record", func(_, state *os.File) error {
			st, err := state.Stat()
			return errors.Join(err, state.Truncate(st.Size()-5))
		}, blockSize},
		{"bad record", func(_, state *os.File) error { return flipAt(state, headerSize+3*recordSize+1) }, blockSize},
		{"bad header", func(_, state *os.File) error { return flipAt(state, 20) }, 1 << 30},
		{"empty state", func(_, state *os.File) error { return state.Truncate(0) }, 1 << 30},
		{"junk after the state", func(_, state *os.File) error {
			_, err := state.Seek(0, io.SeekEnd)
			if err == nil {
				_, err = state.Write(bytes.Repeat([]byte("junk"), 1001))
			}
			return err
		}, 0},
		{"no data file", func(data, _ *os.File) error { return os.Remove(data.Name()) }, 1 << 30},
		{"no state file", func(_, state *os.File) error { return os.Remove(state.Name()) }, 1 << 30},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			root := copyRoot(t, root)
			damage(t, filepath.Join(root, name), tc.damage)
			src := &fakeSource{host: "b", data: data}
			h := join(t, newManager(t, root, Options{}), b, src)
			got, err := readAll(t, h)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("read %d bytes, %v", len(got), err)
			}
			wait(t, h)
			if _, sent := src.stats(); sent > min(b.Size, b.Size-there+tc.again) || sent < b.Size-there {
				t.Errorf("fetched %d bytes, want %d and at most %d more", sent, b.Size-there, tc.again)
			}
		})
	}
}

func damage(t *testing.T, dir string, do func(data, state *os.File) error) {
	t.Helper()
	data, err := os.OpenFile(filepath.Join(dir, dataName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = data.Close() }()
	state, err := os.OpenFile(filepath.Join(dir, stateName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = state.Close() }()
	if err := do(data, state); err != nil {
		t.Fatal(err)
	}
}

func flipAt(f *os.File, off int64) error {
	var b [1]byte
	if _, err := f.ReadAt(b[:], off); err != nil {
		return err
	}
	b[0] ^= 0x10
	_, err := f.WriteAt(b[:], off)
	return err
}

// TestCrashWhileFetching copies the root while it is written, as a power cut would leave it, over and over.
func TestCrashWhileFetching(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(3, 8<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20})
	step := make(chan struct{})
	h := join(t, m, b, &fakeSource{host: "a", data: data, reply: func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
		select {
		case <-step:
		case <-ctx.Done():
		}
		return fakeReply{}, nil
	}})
	for range 8 {
		step <- struct{}{}
		crashed := newManager(t, copyRoot(t, root), Options{})
		c := join(t, crashed, b, &fakeSource{host: "b", data: data})
		wait(t, c)
		_ = c.Close()
	}
	wait(t, h)
}

// TestRottenBlob has a finished blob change on disk: it is found and fetched again, and hard links keep their file.
func TestRottenBlob(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(4, 3<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{})
	h := join(t, m, b, &fakeSource{host: "a", data: data})
	wait(t, h)
	link := filepath.Join(t.TempDir(), "link")
	if err := h.LinkTo(link); err != nil {
		t.Fatal(err)
	}
	_ = h.Close()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	damage(t, filepath.Dir(dataPath(m, b)), func(data, _ *os.File) error { return flipAt(data, 1<<20) })
	rotten, err := os.ReadFile(link)
	if err != nil {
		t.Fatal(err)
	}

	m = newManager(t, root, Options{})
	src := &fakeSource{host: "a", data: data}
	h = join(t, m, b, src)
	got, err := readAll(t, h)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	wait(t, h)
	if now, err := os.ReadFile(link); err != nil || !bytes.Equal(now, rotten) {
		t.Errorf("somebody else's link was written: %v", err)
	}
}

// TestRottenWhileShared has the rot found by a process that shares a finished blob with another one: it must wait for the
// other to leave before it writes.
func TestRottenWhileShared(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(5, 3<<20)
	root := t.TempDir()
	m1, m2 := newManager(t, root, Options{}), newManager(t, root, Options{})
	h1 := join(t, m1, b, &fakeSource{host: "a", data: data})
	wait(t, h1)
	damage(t, filepath.Dir(dataPath(m1, b)), func(data, _ *os.File) error { return flipAt(data, 1<<20) })
	src := &fakeSource{host: "a", data: data}
	h2 := join(t, m2, b, src)
	eventually(t, "the exclusive lock is wanted", func() bool { return m2.List()[0].Phase == PhaseLock })
	if _, sent := src.stats(); sent != 0 {
		t.Errorf("wrote beside another process: %d bytes", sent)
	}
	if err := h1.Close(); err != nil {
		t.Fatal(err)
	}
	wait(t, h2)
	if got, err := readAll(t, h2); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}

// TestLedger claims, lands and gives back at random and compares with a plain list of bytes that are there.
func TestLedger(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		r := rand.New(rand.NewPCG(seed, 0))
		size := 1 + r.Int64N(40*blockSize)
		l := newLedger(size)
		var live []*span
		have := int64(0)
		for range 5000 {
			if l.done() {
				break
			}
			switch i := r.IntN(10); {
			case i < 3:
				if s := l.claim(1+r.Int64N(4*blockSize), size); s != nil {
					live = append(live, s)
				}
			case i < 4:
				off := r.Int64N(size) / blockSize * blockSize
				if s := l.take(off, min(blockEnd(off), size)); s != nil {
					live = append(live, s)
				}
			case i < 8 && len(live) > 0:
				s := live[r.IntN(len(live))]
				n := min(1+r.Int64N(blockSize), blockEnd(s.off)-s.off, s.end-s.off)
				have += n
				crc := uint32(s.off + n)
				if (s.off+n)%blockSize == 0 {
					crc = 0
				}
				l.landed(s, s.off+n, crc)
				live = keepLive(l, live)
			case len(live) > 0:
				l.release(live[r.IntN(len(live))])
				live = keepLive(l, live)
			}
			checkLedger(t, l, have)
		}
		for _, s := range live {
			l.release(s)
		}
		checkLedger(t, l, have)
	}
}

// TestResumeOverlaps has much to check on disk: what is missing beyond it is asked for meanwhile.
func TestResumeOverlaps(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(6, 24<<20)
	root := t.TempDir()
	m := newManager(t, root, lockOptions)
	h := join(t, m, b, &fakeSource{host: "a", data: data, reply: newGate(20 << 20).reply})
	frontierOf(t, h, 20<<20)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := openFolder(filepath.Dir(dataPath(m, b)), b, false)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = errors.Join(f.closeState(), f.data.Close()) }()
	j := newJob(root, b, lockOptions, m.shared)
	j.folder = f
	j.addSources([]Source{&fakeSource{host: "a", data: data}})
	checks, err := j.resume()
	if err != nil || len(checks) != 1 {
		t.Fatal(checks, err)
	}
	j.mu.Lock()
	chunk := j.ledger.claim(1<<20, j.horizon())
	j.mu.Unlock()
	if chunk == nil || chunk.off != 20<<20 {
		t.Fatalf("what is fetched while 20 MiB on disk wait for their check: %+v", chunk)
	}
	// The host hangs, and all that was there is hashed.
	if err := j.recheck(t.Context(), checks); err != nil {
		t.Fatal(err)
	}
	d := j.digester()
	if err := j.hashUpTo(t.Context(), d, f, j.shown()); err != nil || d.off != 20<<20 {
		t.Errorf("hashed %d bytes, %v", d.off, err)
	}
}

func keepLive(l *ledger, live []*span) []*span {
	var out []*span
	for _, s := range live {
		if _, ok := l.live[s]; ok {
			out = append(out, s)
		}
	}
	return out
}

func checkLedger(t *testing.T, l *ledger, have int64) {
	t.Helper()
	if l.there() != have {
		t.Fatalf("%d bytes are there, want %d", l.there(), have)
	}
	last := int64(0)
	for _, g := range l.gaps {
		if g.off < last || g.end <= g.off || g.end > l.size || (g.off%blockSize == 0) != (g.crc == 0) {
			t.Fatalf("bad gap %+v after %d", g, last)
		}
		if g.end%blockSize != 0 && g.end != l.size {
			t.Fatalf("gap ends inside a block: %+v", g)
		}
		last = g.end
	}
	for s := range l.live {
		if s.off >= s.end || (s.off%blockSize == 0) != (s.crc == 0) {
			t.Fatalf("bad live span %+v", s)
		}
	}
	if f := l.frontier(); f > l.size || (l.done() && f != l.size) {
		t.Fatalf("frontier %d of %d", f, l.size)
	}
}

// TestLinkedDataIsNotWritten: data that has another name, though no record says that it is complete, belongs to somebody
// else too. It is replaced, never written.
func TestLinkedDataIsNotWritten(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(51, 3<<20)
	root := t.TempDir()
	f, err := openFolder(filepath.Join(root, folderName(root, b)), b, false)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	if err := errors.Join(os.Link(f.data.Name(), other), f.closeState(), f.data.Close()); err != nil {
		t.Fatal(err)
	}
	m := newManager(t, root, Options{})
	h := join(t, m, b, &fakeSource{host: "a", data: data})
	wait(t, h)
	if got, err := readAll(t, h); err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	if got, err := os.ReadFile(other); err != nil || !bytes.Equal(got, make([]byte, b.Size)) {
		t.Errorf("the other name's file was written: %v", err)
	}
}
