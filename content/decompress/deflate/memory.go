package deflate

import "sync"

// Slabs of the usual sizes outlive their Reader.
var (
	slabs       = sync.Pool{New: func() any { return newSlab(slabSize) }}
	serialSlabs = sync.Pool{New: func() any { return newSlab(serialSlab) }}
)

// poolOf is where slabs of that size are kept, nil for those of tests.
func poolOf(size int) *sync.Pool {
	switch size {
	case slabSize:
		return &slabs
	case serialSlab:
		return &serialSlabs
	}
	return nil
}

// takeSlab returns memory for output, nil if the chunk must wait for its turn,
// or for pieces to be released.
func (c *chunk) takeSlab() *slab {
	e := c.e
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.held >= e.cfg.slabs || e.serial && len(c.pieces) > c.taken {
		return nil
	}
	c.held++
	if n := len(e.free); n > 0 {
		s := e.free[n-1]
		e.free = e.free[:n-1]
		return s
	}
	if p := poolOf(e.cfg.slab); p != nil {
		return p.Get().(*slab)
	}
	return newSlab(e.cfg.slab)
}

// putSlab takes a slab of c back. e.mu is held.
func (e *engine) putSlab(c *chunk, s *slab) {
	c.held--
	if !e.stopped.Load() && !e.final {
		e.free = append(e.free, s)
	} else if p := poolOf(e.cfg.slab); p != nil {
		p.Put(s)
	}
}

// giveBack returns a slab that holds nothing.
func (c *chunk) giveBack(s *slab) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.e.putSlab(c, s)
}

// publish lines up a piece.
func (c *chunk) publish(p piece) {
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.pieces = append(c.pieces, p)
	c.made += p.hi - p.lo
	if p.marked {
		c.unresolved++
	}
	c.e.data.Broadcast()
}

// discard drops all that a chunk made. e.mu is held.
func (e *engine) discard(c *chunk) {
	for _, p := range c.pieces {
		if p.slab != nil {
			e.putSlab(c, p.slab)
		}
	}
	c.pieces, c.taken, c.unresolved, c.made = nil, 0, 0, 0
	c.syms, c.final, c.err = nil, false, nil
	if c.dec != nil && c.dec.out.slab != nil {
		e.putSlab(c, c.dec.out.slab)
		c.dec.out.slab = nil
	}
}

// settleMemory lets another chunk begin once c holds nothing. e.mu is held.
func (e *engine) settleMemory(c *chunk) {
	gone := c.dead || c.verified && c.taken == len(c.pieces)
	if c.settled || c.stage != done || !gone || c.held > 0 {
		return
	}
	c.settled = true
	e.live--
	e.work.Broadcast()
}

// releaseFree gives idle memory to later Readers. e.mu is held.
func (e *engine) releaseFree() {
	if p := poolOf(e.cfg.slab); p != nil {
		for _, s := range e.free {
			p.Put(s)
		}
	}
	e.free, e.inputs = nil, nil
}
