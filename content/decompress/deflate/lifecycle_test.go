package deflate

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"

	"github.com/gantryd/gantry/integration/short"
)

var errSource = errors.New("the source broke")

// TestSourceError delivers what was there and passes the error on, from a source of each kind.
func TestSourceError(t *testing.T) {
	t.Parallel()
	data := prose(300_000)
	in := squeezeGzip(t, data, 6)
	for _, n := range []int{0, 5, 12, 1000, len(in) / 2, len(in) - 1, len(in)} {
		var want int
		for i, l := range layouts {
			src := io.MultiReader(bytes.NewReader(in[:n]), iotest.ErrReader(errSource))
			r, err := NewReader(src, l.opts...)
			if err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if !errors.Is(err, errSource) || errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: after %d bytes: %v", l.name, n, err)
			}
			if i == 0 {
				want = len(got)
			}
			if len(got) != want || !bytes.HasPrefix(data, got) {
				t.Errorf("%s: after %d bytes: %d bytes of output, serially %d", l.name, n, len(got), want)
			}
			if _, again := r.Read(make([]byte, 1)); !sameError(again, err) {
				t.Errorf("%s: then %v", l.name, again)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// growing hands out what has arrived, and waits for the rest.
type growing struct {
	data []byte
	mu   sync.Mutex
	cond sync.Cond
	n    int
	err  error // ends the waiting
}

func newGrowing(data []byte) *growing {
	g := &growing{data: data}
	g.cond.L = &g.mu
	return g
}

func (g *growing) set(n int, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n, g.err = n, err
	g.cond.Broadcast()
}

func (g *growing) ReadAt(p []byte, off int64) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for int(off) >= g.n {
		switch {
		case g.err != nil:
			return 0, g.err
		case int(off) >= len(g.data):
			return 0, io.EOF
		}
		g.cond.Wait()
	}
	return copy(p, g.data[off:g.n]), nil
}

func TestGrowingSource(t *testing.T) {
	t.Parallel()
	data := prose(500_000)
	in := join(squeezeGzip(t, data, 6), make([]byte, 3000))
	for _, l := range layouts {
		src := newGrowing(in)
		go func() {
			for n := 0; n < len(in); n = min(len(in), n+1777) {
				src.set(n, nil)
				runtime.Gosched()
			}
			src.set(len(in), nil)
		}()
		r, err := NewReaderAt(src, l.opts...)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(r)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes, %v", l.name, len(got), err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestClose closes at any moment, also while workers wait for the source, with
// blocks in hand that must stay as they are.
func TestClose(t *testing.T) {
	t.Parallel()
	data := prose(short.Size(2_000_000, 700_000))
	in := squeezeGzip(t, data, 6)
	for _, l := range layouts {
		for blocks := range 8 {
			src := newGrowing(in)
			src.set(len(in)*2/3, nil)
			r, err := NewReaderAt(src, l.opts...)
			if err != nil {
				t.Fatal(err)
			}
			at := 0
			var held [][]byte
			var releases []func()
			go func() {
				for range blocks * 20 {
					runtime.Gosched()
				}
				src.set(len(in)*2/3, errSource) // whoever closes ends the source first
			}()
			for range min(blocks, 2) {
				b, release, err := r.Next()
				if errors.Is(err, errSource) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				held, releases = append(held, b), append(releases, release)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			for i, b := range held {
				if !bytes.Equal(b, data[at:at+len(b)]) {
					t.Fatalf("%s: block %d changed", l.name, i)
				}
				at += len(b)
				releases[i]()
				releases[i]() // a second call does nothing
			}
			if _, _, err := r.Next(); !errors.Is(err, os.ErrClosed) {
				t.Fatalf("%s: Next after Close: %v", l.name, err)
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestBlocksStay keeps as many blocks as it may without waiting, and releases
// them from other goroutines.
func TestBlocksStay(t *testing.T) {
	t.Parallel()
	data := blend(rand.New(rand.NewPCG(5, 5)), short.Size(3_000_000, 1_000_000))
	in := squeezeGzip(t, data, 6)
	for _, l := range layouts {
		r, err := NewReaderAt(bytes.NewReader(in), l.opts...)
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var wrong atomic.Int32
		at := 0
		for {
			b, release, err := r.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			want := data[at : at+len(b)]
			at += len(b)
			wg.Add(1)
			go func() {
				defer wg.Done()
				for range 3 {
					runtime.Gosched()
				}
				if !bytes.Equal(b, want) {
					wrong.Add(1)
				}
				release()
			}()
		}
		wg.Wait()
		if at != len(data) || wrong.Load() != 0 {
			t.Errorf("%s: %d of %d bytes, %d blocks changed", l.name, at, len(data), wrong.Load())
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	}
}

// TestMemoryBounded never releases a block until the Reader can give no more:
// what it holds then is what Memory promises, also for what expands a thousandfold.
func TestMemoryBounded(t *testing.T) {
	t.Parallel()
	const chunk, slab, count = 2000, smallSlab, 4
	for name, data := range map[string][]byte{"zeros": make([]byte, short.Size(30, 10)<<20), "text": prose(short.Size(3_000_000, 2_000_000))} {
		in := squeezeGzip(t, data, 6)
		for _, workers := range []int{1, 2, 4} {
			r, err := NewReaderAt(bytes.NewReader(in), WithWorkers(workers), withSizes(chunk, slab, count))
			if err != nil {
				t.Fatal(err)
			}
			if _, release, err := r.Next(); err != nil {
				t.Fatal(err)
			} else {
				settle(r.e)
				e := r.e
				e.mu.Lock()
				held, chunks := 0, 0
				for c := e.front; c != nil; c = c.next {
					held, chunks = held+c.held, chunks+1
				}
				if most := max(1, workers) * chunksPerCPU; held > most*count || chunks > most || e.live > most {
					t.Errorf("%s, %d workers: %d slabs in %d chunks (%d live)", name, workers, held, chunks, e.live)
				}
				e.mu.Unlock()
				release()
			}
			n, err := r.WriteTo(io.Discard)
			if err != nil || n >= int64(len(data)) {
				t.Errorf("%s, %d workers: %d bytes more, %v", name, workers, n, err)
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// settle waits until all workers wait.
func settle(e *engine) {
	for {
		e.mu.Lock()
		still := e.idle == e.active
		e.mu.Unlock()
		if still {
			return
		}
		runtime.Gosched()
	}
}

// TestMemoryGate holds what is asked for against what is given back, and reads
// with whatever it gets.
func TestMemoryGate(t *testing.T) {
	t.Parallel()
	data := prose(1_000_000)
	in := squeezeGzip(t, data, 6)
	for _, allowed := range []int64{0, 1, 3} {
		var used, most atomic.Int64
		gate := WithMemory(func(n int64) bool {
			if used.Add(n) > allowed*n {
				used.Add(-n)
				return false
			}
			most.Store(max(most.Load(), used.Load()))
			return true
		}, func(n int64) { used.Add(-n) })
		got, err := inflateGzip(in, WithWorkers(8), withSizes(4000, smallSlab, 4), gate)
		if err != nil || !bytes.Equal(got, data) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		if used.Load() != 0 || most.Load() > allowed*workerMemory {
			t.Errorf("with %d: at most %d, at the end %d", allowed, most.Load(), used.Load())
		}
	}
}

// TestNoAllocationPerMember reads thousands of members.
func TestNoAllocationPerMember(t *testing.T) { //nolint:paralleltest // counts the process's allocations
	in := tiny(t, prose(short.Size(1_000_000, 200_000)), 200)
	got := testing.AllocsPerRun(3, func() {
		for _, workers := range []int{1, 4} {
			if _, err := inflateGzip(in, WithWorkers(workers)); err != nil {
				t.Fatal(err)
			}
		}
	})
	if got > 500 { // for 10,000 members; 2000 with -short
		t.Errorf("%v allocations", got)
	}
}

// TestSameWithAnyProcs is the default: as many workers as GOMAXPROCS.
func TestSameWithAnyProcs(t *testing.T) { //nolint:paralleltest // sets GOMAXPROCS
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(0))
	data := append(goTarball(t, short.Size(12, 2)<<20), noise(short.Size(3, 1)<<20, false)...)
	in := join(gzipTool(t, data, 6), tiny(t, data[:1<<20], 3000))
	data = append(data, data[:1<<20]...)
	for _, procs := range []int{1, 2, 4, 8} {
		runtime.GOMAXPROCS(procs)
		for _, stream := range []bool{false, true} {
			got, err := inflateVia(in, stream)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("GOMAXPROCS %d: %d bytes, %v; want %d", procs, len(got), err, len(data))
			}
		}
	}
}

func TestArguments(t *testing.T) {
	t.Parallel()
	if _, err := NewReader(nil); err == nil {
		t.Error("no error without a source")
	}
	if _, err := NewReaderAt(nil); err == nil {
		t.Error("no error without a source")
	}
	if Memory(0) != Memory(1) || Memory(2) <= Memory(1) || Memory(8)-Memory(7) != workerMemory {
		t.Error("Memory", Memory(0), Memory(1), Memory(2), Memory(7), Memory(8))
	}
}
