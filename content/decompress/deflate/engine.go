package deflate

import (
	"sync"
	"sync/atomic"
)

// engine cuts the input into chunks, has them decoded by workers and lines up
// what they make. One chain runs through the chunks: the end of each, place and
// window, is the begin of the next. A chunk that begins where the chain arrives
// is verified; head is the last of them. The others are guesses.
type engine struct {
	cfg    config
	src    source
	serial bool // one worker: the caller decodes

	mu     sync.Mutex
	work   sync.Cond // workers wait for a job
	data   sync.Cond // the consumer waits for a piece or a release
	front  *chunk    // its pieces are delivered next
	head   *chunk    // the verified chunk that is not done, or the last that is
	tail   *chunk
	live   int // chunks that hold memory
	final  bool
	active int  // workers
	idle   int  // of them, those that wait
	ended  bool // of the source
	ratio  int  // output per input of the last chunk that was done

	copying bool // of the chain: it is at stored blocks, so no guesses are made

	counts counts

	stopped atomic.Bool
	wg      sync.WaitGroup

	free   []*slab
	inputs [][]byte
}

func newEngine(src source, opts []Option) *engine {
	e := &engine{cfg: newConfig(opts), src: src, ratio: 4}
	e.serial = e.cfg.workers == 1
	e.work.L, e.data.L = &e.mu, &e.mu
	seg := &segment{e: e, size: e.cfg.first, refs: 1}
	c := &chunk{e: e, seg: seg, last: seg, hi: int64(seg.size), stage: ready}
	c.verify(new(window))
	c.began, c.sure, c.begin = true, true, mark{member: true}
	e.front, e.head, e.tail, e.live = c, c, c, 1
	return e
}

// chunkSize is how many compressed bytes the next segment gets: fewer if the
// stream expands a lot, or is only copied, which should happen in the cache.
func (e *engine) chunkSize() int {
	if e.copying {
		return max(e.cfg.chunk/2, e.cfg.least)
	}
	return max(min(e.cfg.chunk, chunkOutput/max(e.ratio, 1)&^4095), e.cfg.least)
}

// counts is what tests and tuning want to know.
type counts struct {
	right    int // guesses that were verified
	wrong    int // guesses that had to be decoded again
	late     int // of the right ones, those that went on with a known window
	resolved int // bytes that were symbols first
	direct   int // runs of stored blocks that were read without segments
}

// job is what a worker does next.
type job uint8

const (
	nothing job = iota
	decodeIt
	resolveIt
)

// pick returns the most urgent job. What the chain waits for goes first, what
// the consumer waits for second, guesses last. e.mu is held.
func (e *engine) pick() (job, *chunk) {
	if e.stopped.Load() {
		return nothing, nil
	}
	if c := e.head; c.stage == ready && c.held < e.cfg.slabs {
		return decodeIt, c
	}
	for c := e.front; c != nil && c.verified; c = c.next {
		if c.unresolved > 0 && !c.resolving && c.readable() {
			return resolveIt, c
		}
	}
	if e.final || e.serial || e.live >= chunksPerCPU*max(e.active, 1) {
		return nothing, nil
	}
	return e.lengthen()
}

// lengthen adds a chunk behind the last one, if there may be input for it. e.mu
// is held.
func (e *engine) lengthen() (job, *chunk) {
	for {
		tail := e.tail
		chained := tail == e.head && tail.stage == done
		if !chained && (e.ended || e.copying || !e.cfg.spare()) {
			return nothing, nil
		}
		seg := e.after(tail.last)
		seg.owned = true
		c := &chunk{e: e, seg: seg, last: seg, lo: seg.lo, hi: seg.lo + int64(seg.size)}
		tail.next, e.tail = c, c
		e.live++
		if chained {
			e.advance(tail)
		}
		if !c.dead { // the chain may arrive behind it
			return decodeIt, c
		}
	}
}

// setCopying turns guesses off and on. e.mu is held.
func (e *engine) setCopying(yes bool) {
	if e.copying != yes {
		e.work.Broadcast() // guesses may be made
	}
	e.copying = yes
}

// loaded takes note of a segment: whether there is work for one more worker.
func (e *engine) loaded(g *segment) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if g.err != nil {
		e.ended = true
		return
	}
	if !e.serial {
		e.spawn()
	}
}

// run is a worker.
func (e *engine) run() {
	defer e.wg.Done()
	e.mu.Lock()
	defer e.mu.Unlock()
	for {
		j, c := e.pick()
		switch {
		case j == decodeIt:
			e.decode(c)
		case j == resolveIt:
			e.resolve(c)
		case e.final || e.stopped.Load():
			e.active--
			return
		default:
			e.idle++
			e.work.Wait()
			e.idle--
		}
	}
}

// spawn starts a worker if there may be one more and none is waiting. e.mu is held.
func (e *engine) spawn() {
	if e.idle > 0 || e.active >= e.cfg.workers || e.final || e.stopped.Load() {
		return
	}
	asked := e.active > 0
	if asked && !e.cfg.grow(workerMemory) {
		return
	}
	e.active++
	e.wg.Add(1)
	go func() {
		if asked {
			defer e.cfg.shrink(workerMemory)
		}
		e.run()
	}()
}

// decode runs the decoder of c until it ends, pauses or is called back. e.mu is
// held, but not while it runs.
func (e *engine) decode(c *chunk) {
	c.stage = running
	if c.dec == nil {
		c.dec = e.takeDecoder(c)
	}
	e.mu.Unlock()
	v := c.dec.run()
	e.mu.Lock()
	e.settle(c, v)
}

// settle takes note of what became of a chunk that ran. e.mu is held.
func (e *engine) settle(c *chunk, v outcome) {
	c.stage = paused
	switch {
	case c.dead:
		e.drop(c)
		return
	case e.stopped.Load():
		return
	case c.given != nil:
		e.restart(c, c.given)
		return
	case v == failed && c.verified:
		// It met damage as a guess, and proved right since: known bytes before it count.
		e.restart(c, &start{c.begin, c.win})
		return
	case v == failed:
		c.stage = useless
	case v == finished:
		c.stage = done
	}
	if !c.verified {
		return
	}
	if c.stage == done {
		e.advance(c)
	} else {
		c.stage = ready
	}
	e.work.Broadcast()
	e.data.Broadcast()
}

// advance carries the chain on from c, which is verified and done, over all
// chunks that are done already. e.mu is held.
func (e *engine) advance(c *chunk) {
	for {
		e.head = c
		e.complete(c)
		if c.final {
			e.finish(c)
			return
		}
		n := c.next
		switch {
		case n == nil:
			return // lengthen goes on
		case c.end.bit >= n.hi*8:
			e.absorb(c, n)
			continue
		}
		e.give(n, &start{c.end, c.window()})
		if n.stage != done {
			e.head = n
			e.work.Broadcast()
			return
		}
		c = n
	}
}

// give tells n where it begins. e.mu is held.
func (e *engine) give(n *chunk, s *start) {
	if n.began && n.begin == s.mark && (s.member || s.win.n == windowSize) {
		e.counts.right++
		n.verify(s.win)
		switch n.stage {
		case paused:
			n.stage = ready
		case useless:
			e.restart(n, s)
		}
		return
	}
	if n.stage == running {
		n.given = s
		n.signal.Store(callBack)
		return
	}
	e.restart(n, s)
}

// restart has n decoded from s on, with a known window. What it made so far is
// dropped; nobody has seen it. e.mu is held.
func (e *engine) restart(n *chunk, s *start) {
	if n.began {
		e.counts.wrong++
	}
	e.discard(n)
	n.given, n.began, n.sure, n.begin, n.stage = nil, true, true, s.mark, ready
	n.verify(s.win)
	if n.dec != nil {
		n.dec.started = false
	}
}

// overflow is asked by c for the segment behind g, which comes with a reference. A
// guess may go into the one behind its own only: everything else must wait until
// its decoder knows that it is verified. One that is dead gets none: claim may have
// left the source to another.
func (e *engine) overflow(c *chunk, g *segment) (*segment, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if c.dead || g != c.last && !c.sure {
		return nil, errNotYet
	}
	if g != c.last {
		if n := c.next; n != nil && n.seg == g {
			e.absorb(c, n)
		} else {
			e.own(c, g)
		}
	}
	next := e.after(g)
	next.refs++
	return next, nil
}

// own makes g the last segment of c. e.mu is held.
func (e *engine) own(c *chunk, g *segment) {
	if g == c.last {
		return
	}
	c.last, c.hi = g, g.lo+int64(g.size)
	g.owned = true
	e.unref(g)
}

// absorb makes n, through which c has decoded, a part of c. e.mu is held.
func (e *engine) absorb(c, n *chunk) {
	c.next, c.last, c.hi = n.next, n.last, n.hi
	if e.tail == n {
		e.tail = c
	}
	e.kill(n)
}

// kill ends a chunk that is not needed. e.mu is held.
func (e *engine) kill(n *chunk) {
	n.dead = true
	n.signal.Store(callBack)
	if n.stage != running {
		e.drop(n)
	}
}

// drop frees what a dead chunk holds. e.mu is held.
func (e *engine) drop(n *chunk) {
	e.discard(n)
	e.complete(n)
	n.stage = done
	e.settleMemory(n)
}

// complete frees what is needed for decoding only. e.mu is held.
func (e *engine) complete(c *chunk) {
	if c.freed {
		return
	}
	c.freed = true
	e.unref(c.seg)
	if c.dec != nil {
		if in, out := int(c.end.bit>>3-c.begin.bit>>3), c.made; in > 4096 {
			e.ratio = out / in
		}
		e.putDecoder(c)
	}
}

// finish ends the chain at c: chunks behind it were made of padding. e.mu is held.
func (e *engine) finish(c *chunk) {
	e.final = true
	for n := c.next; n != nil; n = n.next {
		e.kill(n)
	}
	c.next, e.tail = nil, c
	e.work.Broadcast()
	e.data.Broadcast()
}

// resolve replaces the markers of c. e.mu is held, but not while it works.
func (e *engine) resolve(c *chunk) {
	c.resolving = true
	marked := append([]piece(nil), c.pieces[:c.unresolved]...)
	win := c.win
	e.mu.Unlock()
	table := newValues(win)
	bytes := 0
	for i := range marked {
		p := &marked[i]
		bytes += p.hi - p.lo
		p.slab.resolve(p.lo, p.hi, table)
		p.head = sumOf(p.slab.b[p.lo:p.hi])
		p.marked = false
	}
	valueTables.Put(table)
	e.mu.Lock()
	copy(c.pieces, marked)
	c.unresolved, c.resolving = 0, false
	e.counts.resolved += bytes
	e.data.Broadcast()
}
