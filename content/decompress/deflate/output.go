package deflate

// output collects what a decoder makes, in slabs. In front of each lies what the
// slab before ended with, as the window.
type output struct {
	c      *chunk
	marked bool
	slab   *slab
	n      int  // end of the output in slab
	from   int  // where the output of this piece begins; before it lies the window
	base   int  // where the window begins: never before the member's first byte
	summed int  // up to where part reaches
	part   sum  // of the member at hand, in this piece
	lazy   bool // what is read directly is summed up by whoever reads the piece
	clean  int  // from where on there is no marker
	cur    piece

	carry *window  // of the slab before
	syms  []uint16 // while marked
}

// reset begins anew, behind a known window or, if win is nil, an unknown one.
func (o *output) reset(c *chunk, win *window) {
	*o = output{c: c, marked: win == nil, syms: o.syms[:0], carry: new(window)}
	if win != nil {
		*o.carry = *win
	}
}

// size is how much the slab takes, in what is put into it.
func (o *output) size() int {
	if o.marked {
		return len(o.slab.u)
	}
	return len(o.slab.b)
}

// room makes sure that there is some to decode to; if not, the chunk must pause.
func (o *output) room() bool { return o.roomAfter(windowSize) }

// roomAfter is room where so many bytes of the window are enough.
func (o *output) roomAfter(keep int) bool {
	if o.slab != nil && o.size()-o.n >= outMargin {
		return true
	}
	o.flushKeeping(keep)
	s := o.c.takeSlab()
	if s == nil {
		return false
	}
	o.slab, o.base, o.clean = s, 0, 0
	if o.marked {
		o.n = copy(s.u, o.syms)
		o.clean = o.n // for all we know; see decodeMarked
		if o.n > 0 {
			o.clean = lastMarker(o.syms) + 1
		}
	} else {
		o.n = windowSize
		o.base = windowSize - o.carry.n
		copy(s.b[o.base:], o.carry.bytes())
	}
	o.from, o.summed, o.part = o.n, o.n, sum{}
	o.lazy = o.c.awaited()
	return true
}

// decode has the inflater append to the slab.
func (o *output) decode(f *inflater, stop int64) (st status, err error) {
	lim := min(o.size(), o.n+pollEvery)
	if !o.marked {
		var n int
		n, st, err = f.decode(o.slab.b[o.base:lim], o.n-o.base, stop)
		o.n = n + o.base
		o.sum() // while the bytes are in the cache
		return st, err
	}
	was, clean := o.n, 0
	f.clean = 0 // of this call only: the slab may be another
	o.n, clean, st, err = f.decodeMarked(o.slab.u[:lim], o.n, stop)
	if clean > was {
		o.clean = clean
	}
	if o.n-o.clean >= windowSize {
		o.learn(nil)
	}
	return st, err
}

// learn goes on with bytes: the window is known. before is that of the chunk,
// nil if no marker lies within the last 32 Ki symbols.
func (o *output) learn(before *window) {
	if !o.marked {
		return
	}
	o.flush()
	o.carry.setResolved(o.syms, before)
	o.marked = false
}

// flush gives the slab away as a piece, keeping the window.
func (o *output) flush() { o.flushKeeping(windowSize) }

func (o *output) flushKeeping(keep int) {
	p := o.cur
	o.cur = piece{}
	p.slab, p.lo, p.hi, p.marked = o.slab, o.from, o.n, o.marked
	switch {
	case o.slab == nil:
		p.lo, p.hi, p.marked = 0, 0, false
	case o.marked:
		o.syms = append(o.syms[:0], o.slab.u[max(0, o.n-windowSize):o.n]...)
	default:
		o.carry.set(o.slab.b[max(o.base, o.n-keep):o.n])
		if p.ends {
			p.tail = o.part
		} else {
			p.head = o.part
		}
		p.unsummed = o.n - o.summed
	}
	o.slab = nil
	if p.hi > p.lo || p.ends {
		o.c.publish(p)
	} else if p.slab != nil {
		o.c.giveBack(p.slab)
	}
}

// sum adds what is not summed up yet.
func (o *output) sum() {
	o.part.add(o.slab.b[o.summed:o.n])
	o.summed = o.n
}

// endMember takes a member's trailer. Of a member that begins before the piece
// only a part is known here; whoever reads the pieces checks it.
func (o *output) endMember(t trailer) error {
	if o.marked {
		o.flush()
		o.marked = false
	}
	var s sum
	if o.slab != nil {
		s, o.part = o.part, sum{}
		o.base = o.n
	}
	o.carry.n = 0
	if o.cur.ends {
		return t.check(s)
	}
	o.cur.head, o.cur.ends, o.cur.want = s, true, t
	return nil
}

// handOver notes where the chunk ends, after flush.
func (o *output) handOver(at mark) {
	c := o.c
	c.e.mu.Lock()
	defer c.e.mu.Unlock()
	c.end, c.carry = at, o.carry
	if o.marked {
		c.syms, o.syms = o.syms, nil
	}
	o.carry = nil
}
