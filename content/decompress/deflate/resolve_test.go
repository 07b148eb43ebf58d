package deflate

import (
	"bytes"
	"runtime"
	"sync"
	"testing"
)

// TestTrustWhileResolving: a guess is told that it is verified while it still has
// symbols that were not published. Whoever resolves the pieces of a chunk that
// may be read must get these, too, or nobody ever would.
func TestTrustWhileResolving(t *testing.T) {
	t.Parallel()
	win := new(window)
	win.set(bytes.Repeat([]byte("w"), windowSize))
	for range 3000 {
		e := newEngine(source{r: bytes.NewReader(nil)}, []Option{WithWorkers(2), withSizes(4000, smallSlab, 4)})
		c := &chunk{e: e, stage: running}
		d := e.takeDecoder(c)
		c.dec = d
		d.out.reset(c, nil)
		for range 2 { // one piece that is published, one that is not
			if !d.out.room() {
				t.Fatal("no slab")
			}
			d.out.slab.u[d.out.n] = marker | 7
			d.out.n++
			if len(c.pieces) == 0 {
				d.out.flush()
			}
		}
		e.mu.Lock()
		c.verify(win)
		e.mu.Unlock()
		var wg sync.WaitGroup
		wg.Go(d.trust)
		wg.Go(func() {
			for range 2 {
				e.mu.Lock()
				for !c.readable() {
					e.mu.Unlock()
					runtime.Gosched()
					e.mu.Lock()
				}
				if c.unresolved > 0 {
					e.resolve(c)
				}
				e.mu.Unlock()
			}
		})
		wg.Wait()
		for i, p := range c.pieces {
			if p.marked && i >= c.unresolved {
				t.Fatalf("piece %d of %d has markers, and %d are to be resolved", i, len(c.pieces), c.unresolved)
			}
		}
	}
}
