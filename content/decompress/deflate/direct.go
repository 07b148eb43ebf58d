package deflate

import "encoding/binary"

const (
	// directStep is how many stored bytes are read from the source at once: they are
	// summed up while they are in the cache of the first level.
	directStep = 32 << 10
	// directLeast is from what length on a stored block is read directly: each costs a
	// call of the source. What follows the last such block is read in segments again.
	directLeast = 8 << 10
	// storedHead is what stands between two stored blocks: three bits, padding, and
	// the length twice.
	storedHead = 5
)

// direct says whether the rest of the stored block at hand may be read from the
// source to where it is wanted, without a segment. So it is where one worker copies
// block after block, and nobody has read ahead.
func (d *decoder) direct() bool {
	return d.inf.state == inStored && d.inf.left >= d.c.e.cfg.direct && d.sure && !d.out.marked &&
		d.base+d.inf.bit()>>3 == d.seg.end() && d.seg.err == nil && d.c.e.claim(d.c, d.seg)
}

// claim leaves the source behind g to the decoder of c, until resume; not while there
// is a guess behind c, which has g or may go there.
func (e *engine) claim(c *chunk, g *segment) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.serial && !e.copying || g.next != nil || c.next != nil {
		return false
	}
	e.own(c, g)
	e.counts.direct++
	return true
}

// resume ends that: data, which was read from lo on, and err, which ended it if it
// is not nil, are the segment that c goes on with.
func (e *engine) resume(c *chunk, lo int64, data []byte, err error) *segment {
	e.mu.Lock()
	defer e.mu.Unlock()
	g := &segment{e: e, lo: lo, size: len(data), refs: 2, data: append([]byte(nil), data...), err: err}
	g.once.Do(func() {}) // it is loaded
	c.last.next = g
	e.own(c, g) // the other reference is that of feed
	e.ended = e.ended || err != nil
	return g
}

// stored reads one step of stored blocks, and the header of the next one with the
// end of each.
func (d *decoder) stored() (outcome, error) {
	f := &d.inf
	if !d.out.roomAfter(max(0, windowSize-f.left)) {
		return pausing, nil
	}
	want := min(f.left, directStep, d.out.size()-d.out.n)
	head := 0
	if want == f.left && d.out.size()-d.out.n-want >= storedHead && !f.final {
		head = storedHead
	}
	buf := d.out.slab.b[d.out.n : d.out.n+want+head]
	n, err := d.c.e.src.fill(buf, d.off)
	d.off += int64(n)
	got := min(n, want)
	f.left -= got
	f.plain += got
	d.out.n += got
	if !d.out.lazy {
		d.out.sum()
	}
	rest := buf[got:n]
	switch {
	case n < len(buf):
	case f.left > 0:
		return going, nil
	case head == 0 && !f.final: // the next slab has a place for it
		return going, nil
	case head > 0 && storedFollows(rest, d.c.e.cfg.direct):
		f.left = int(binary.LittleEndian.Uint16(rest[1:]))
		return going, nil
	}
	d.rejoin(rest, err)
	return going, nil
}

// storedFollows says whether h is the header of another stored block of at least
// that many bytes.
func storedFollows(h []byte, least int) bool {
	n := binary.LittleEndian.Uint16(h[1:])
	return h[0]&7 == 0 && n == ^binary.LittleEndian.Uint16(h[3:]) && int(n) >= least
}

// rejoin goes on with segments, at rest.
func (d *decoder) rejoin(rest []byte, err error) {
	d.rest(d.c.e.resume(d.c, d.off-int64(len(rest)), rest, err))
	d.phase = atBlocks
	d.inf.in, d.inf.at, d.inf.eof = d.in, 0, false
	if d.inf.left == 0 {
		d.inf.leave()
	}
	if d.stop >= 0 { // a boundary: what follows may be of another kind
		d.seen, d.plain, d.inf.plain = d.base*8, 0, 0
		d.stop = d.seen + copyStretch*8
	}
}
