package sha256x2

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"math/rand/v2"
	"runtime"
	"sync"
	"testing"
	"time"
)

func random(seed uint64, n int) []byte {
	p := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(p)
	return p
}

func want(t *testing.T, what string, h hash.Hash, data []byte) {
	t.Helper()
	if got, want := hex.EncodeToString(h.Sum(nil)), fmt.Sprintf("%x", sha256.Sum256(data)); got != want {
		t.Errorf("%s: %d bytes: got %s, want %s", what, len(data), got, want)
	}
}

// needLanes is for tests of what cannot run everywhere; CI's processors can.
func needLanes(t testing.TB) {
	t.Helper()
	if !hasLanes() {
		t.Skipf("%s without SHA-NI: everything is crypto/sha256", runtime.GOARCH)
	}
	if !lanes {
		t.Fatal("the processor has SHA-NI, but pairs are off: does the self-test fail?")
	}
}

func TestBlocks(t *testing.T) {
	t.Parallel()
	needLanes(t)
	for n := range 40 {
		for _, shift := range []int{0, 1, 15} { // unaligned
			data := [2][]byte{random(uint64(2*n), shift+n*64)[shift:], random(uint64(2*n+1), shift+n*64)[shift:]}
			var d [2]*digest
			for i := range d {
				d[i] = new(Pool).New().(*digest)
				d[i].feed(data[1-i], n*64) // a state that is not the initial one
				d[i].rest = data[i]
			}
			if n > 0 {
				if err := pair(d[0], d[1], n*64); err != nil {
					t.Fatal(err)
				}
			}
			for i := range d {
				want(t, fmt.Sprintf("lane %d, shift %d", i, shift), d[i], append(append([]byte{}, data[1-i]...), data[i]...))
			}
		}
	}
	a, b := [8]uint32{1}, [8]uint32{2}
	blocks2(&a, &b, nil, nil, 0)
	if (a != [8]uint32{1}) || (b != [8]uint32{2}) {
		t.Errorf("no blocks changed a state: %v %v", a, b)
	}
}

// TestLengths has every length around the edges that matter, alone and beside another stream, in one write and after a
// part of a block.
func TestLengths(t *testing.T) {
	t.Parallel()
	edges := []int{0, 64, worthwhile, slice, 2 * slice}
	data := random(7, 2*slice+200)
	var p Pool
	defer company(&p)()
	for _, edge := range edges {
		for n := max(0, edge-66); n <= edge+66; n++ {
			h := p.New()
			split := n % 67 % (n + 1)
			_, _ = h.Write(data[:split])
			if got, err := h.Write(data[split:n]); got != n-split || err != nil {
				t.Fatalf("Write of %d bytes: %d, %v", n-split, got, err)
			}
			want(t, "beside another", h, data[:n])
		}
	}
}

// company keeps a stream of p busy until the returned function is called.
func company(p *Pool) (stop func()) {
	var g sync.WaitGroup
	end := make(chan struct{})
	data := make([]byte, 300<<10)
	g.Go(func() {
		for h := p.New(); ; {
			select {
			case <-end:
				return
			default:
				_, _ = h.Write(data)
			}
		}
	})
	return func() { close(end); g.Wait() }
}

// TestStreams has up to eight streams at once, whose writes are of all sizes and whose sums are asked for in between.
func TestStreams(t *testing.T) {
	t.Parallel()
	for _, single := range []bool{false, true} {
		for streams := 1; streams <= 8; streams++ {
			t.Run(fmt.Sprintf("%d single=%v", streams, single), func(t *testing.T) {
				t.Parallel()
				p := Pool{single: single}
				var g sync.WaitGroup
				for i := range streams {
					g.Go(func() { stream(t, p.New(), uint64(i)) })
				}
				g.Wait()
				alone, paired := p.Hashed()
				t.Logf("%d bytes alone, %d in pairs", alone, paired)
				p.mu.Lock()
				defer p.mu.Unlock()
				if p.alone != 0 || p.waiting != nil {
					t.Errorf("afterwards %d hash alone and %v waits", p.alone, p.waiting)
				}
			})
		}
	}
}

// stream writes random splits, and after a Reset again.
func stream(t *testing.T, h hash.Hash, seed uint64) {
	if h.Size() != sha256.Size || h.BlockSize() != sha256.BlockSize {
		t.Errorf("sizes %d and %d", h.Size(), h.BlockSize())
	}
	r := rand.New(rand.NewPCG(seed, 2))
	data := random(seed, 1<<20)
	for range 2 {
		h.Reset()
		want(t, "nothing", h, nil)
		for off := 0; off < len(data); {
			n := min(len(data)-off, r.IntN(1<<(1+r.IntN(19))))
			_, _ = h.Write(data[off : off+n])
			off += n
			if r.IntN(8) == 0 {
				want(t, "in the middle", h, data[:off])
			}
			if r.IntN(20) == 0 {
				time.Sleep(time.Duration(r.IntN(3000)) * time.Microsecond)
			}
		}
		want(t, "all", h, data)
		_, _ = h.Write(data[:r.IntN(len(data))]) // which Reset forgets
	}
}

// TestTaken has a stream that waits in the middle of another's slice, and is taken along up to the end of the shorter
// write; whoever is left goes on by itself.
func TestTaken(t *testing.T) {
	t.Parallel()
	needLanes(t)
	for _, sizes := range [][2]int{{1 << 20, 1 << 20}, {1 << 20, 100_000}, {100_000, 1 << 20}} {
		t.Run(fmt.Sprint(sizes), func(t *testing.T) {
			t.Parallel()
			var (
				p Pool
				g sync.WaitGroup
			)
			h := [2]hash.Hash{p.New(), p.New()}
			data := [2][]byte{random(1, sizes[0]), random(2, sizes[1])}
			p.slices(1)
			g.Go(func() { _, _ = h[0].Write(data[0]) })
			for !p.waits() {
				runtime.Gosched()
			}
			p.slices(-1)
			_, _ = h[1].Write(data[1])
			g.Wait()
			for i := range h {
				want(t, fmt.Sprintf("stream %d", i), h[i], data[i])
			}
			shorter := min(sizes[0], sizes[1]) / 64 * 64
			if alone, paired := p.Hashed(); paired != uint64(2*shorter) || alone != uint64(max(sizes[0], sizes[1])/64*64-shorter) {
				t.Errorf("%d bytes alone, %d in pairs", alone, paired)
			}
		})
	}
}

// TestLeft has a stream that waits for a slice to end, after which nothing more comes: it must be told.
func TestLeft(t *testing.T) {
	t.Parallel()
	needLanes(t)
	var (
		p    Pool
		g    sync.WaitGroup
		data = random(1, 200_000)
		h    = p.New()
	)
	p.slices(1)
	g.Go(func() { _, _ = h.Write(data) })
	for !p.waits() {
		runtime.Gosched()
	}
	p.slices(-1)
	p.hash(p.New().(*digest), nil)
	g.Wait()
	want(t, "left", h, data)
}

// slices is as if so many more writes had begun to hash a slice alone.
func (p *Pool) slices(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.alone += n
}

func (p *Pool) waits() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.waiting != nil
}

// TestSavings has a stream that waits in vain: it must not do so again before it has the time for it.
func TestSavings(t *testing.T) {
	t.Parallel()
	needLanes(t)
	var p Pool
	a, b := p.New().(*digest), p.New().(*digest)
	data := make([]byte, slice)
	_, _ = b.Write(data)
	p.recent[0].at = time.Now().Add(time.Hour) // b stays active
	_, _ = a.Write(data)
	if a.timer == nil {
		t.Fatal("a did not wait for b")
	}
	if a.credit != 0 {
		t.Errorf("after a wait in vain it may wait for %v more", a.credit)
	}
	a.began = time.Now().Add(time.Hour)
	if a.earn(); a.credit > 0 {
		t.Errorf("no time has passed, but it may wait for %v", a.credit)
	}
	a.began = time.Now().Add(-time.Hour)
	if a.earn(); a.credit != savings {
		t.Errorf("after an hour it may wait for %v, want %v", a.credit, savings)
	}
	if p.waiting != nil {
		t.Errorf("%v still waits", p.waiting)
	}
}

func FuzzStreams(f *testing.F) {
	f.Add([]byte("abc"), uint32(1), uint32(64), uint32(70_000))
	f.Add(random(3, 1000), uint32(100_000), uint32(16<<10), uint32(65))
	f.Fuzz(func(t *testing.T, data []byte, n, first, second uint32) {
		const most = 1 << 18
		if len(data) == 0 {
			data = []byte{0}
		}
		long := make([]byte, n%most)
		for i := range long {
			long[i] = data[i%len(data)] + byte(i/len(data))
		}
		var (
			p Pool
			g sync.WaitGroup
		)
		for i, step := range []uint32{first, second} {
			g.Go(func() {
				h, step := p.New(), int(step%most)+1
				for off := 0; off < len(long); off += step {
					_, _ = h.Write(long[off:min(off+step, len(long))])
				}
				want(t, fmt.Sprintf("stream %d in steps of %d", i, step), h, long)
			})
		}
		g.Wait()
	})
}
