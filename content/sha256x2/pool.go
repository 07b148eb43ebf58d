package sha256x2

import (
	"crypto/sha256"
	"fmt"
	"hash"
	"sync"
	"time"
)

const (
	// slice is how many bytes of a stream are hashed without looking up. crypto/sha256 does as many without
	// letting the scheduler in.
	slice = 64 << 10
	// patience bounds a single wait for a partner. It is what a MiB takes to arrive where two cores do all the work of a
	// pull: shorter ones are in vain too often.
	patience = 8 * time.Millisecond
	// worthWaiting is the shortest one.
	worthWaiting = patience / 8
	// share is the part of a stream's time that it may wait for partners: one in share.
	share = 4
	// savings bounds what a stream puts by for that.
	savings = 2 * patience
	// activeFor is for how long a stream counts as active after it was written to.
	activeFor = 100 * time.Millisecond
)

// Pool makes hashes that look for each other. It is safe for concurrent use; each of its hashes is for one goroutine at a
// time, as any hash.Hash.
type Pool struct {
	single bool // for tests: as where the processor has no lanes

	mu      sync.Mutex
	waiting *digest   // wants a partner; never more than one, since they would be partners
	queued  bool      // waiting waits for a slice to end, without a timer
	alone   int       // writes whose slice is hashed alone just now; each of them looks at waiting when it ends
	recent  [2]visit  // the last two streams that were written to
	hashed  [2]uint64 // bytes by how many lanes were in use, less one
}

// shared is the process's: what may be brought together is whatever its cores do.
var shared Pool

// New returns a SHA-256 of the pool that the whole process shares.
func New() hash.Hash { return shared.New() }

// visit is that a stream was written to.
type visit struct {
	who *digest
	at  time.Time
}

// New returns a SHA-256.
func (p *Pool) New() hash.Hash {
	std, ok := sha256.New().(standard)
	if !ok || !lanes || p.single {
		return sha256.New()
	}
	return &digest{std: std, pool: p, wake: make(chan struct{}, 1)}
}

// Hashed returns how many bytes of larger writes were hashed alone and in pairs so far.
func (p *Pool) Hashed() (alone, paired uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hashed[0], p.hashed[1]
}

// hash hashes whole, which is whole blocks.
func (p *Pool) hash(d *digest, whole []byte) {
	d.earn()
	d.rest = whole
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(d.rest) > 0 {
		now := time.Now()
		p.visited(d, now)
		switch {
		case p.waiting != nil:
			p.together(d)
		case p.alone > 0:
			p.queue(d)
		case d.credit >= worthWaiting && len(d.rest) >= worthwhile && p.company(d, now):
			p.linger(d, now)
		default:
			p.solo(d)
		}
	}
	d.rest = nil
	if p.waiting != nil && p.queued && p.alone == 0 {
		p.release().wake <- struct{}{} // no slice that it waits for ends any more
	}
}

// earn books what the time since the last Write is worth.
func (d *digest) earn() {
	now := time.Now()
	d.credit = min(savings, max(0, d.credit)+now.Sub(d.began)/share)
	d.began = now
}

// visited notes that d is active. Called with mu held, as all from here on but left, and they return so.
func (p *Pool) visited(d *digest, now time.Time) {
	if p.recent[0].who != d {
		p.recent[1] = p.recent[0]
	}
	p.recent[0] = visit{d, now}
}

// company says whether another stream than d, which was just visited, is active.
func (p *Pool) company(d *digest, now time.Time) bool {
	other := p.recent[1]
	return other.who != nil && other.who != d && now.Sub(other.at) < activeFor
}

// left is for a stream that may have ended: nobody waits for it any more.
func (p *Pool) left(d *digest) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range p.recent {
		if p.recent[i].who == d {
			p.recent[i] = visit{}
		}
	}
}

// release ends the wait of who waits. The caller must send to its wake.
func (p *Pool) release() *digest {
	w := p.waiting
	if !p.queued {
		w.credit -= time.Since(w.lingers)
	}
	p.waiting = nil
	return w
}

// solo hashes a slice of d.
func (p *Pool) solo(d *digest) {
	n := min(slice, len(d.rest))
	p.alone++
	p.mu.Unlock()
	d.rest = d.feed(d.rest, n)
	p.mu.Lock()
	p.alone--
	p.hashed[0] += uint64(n)
}

// together takes who waits along, up to the end of the shorter one. Whoever is left looks for another partner, each
// on its own goroutine.
func (p *Pool) together(d *digest) {
	w := p.release()
	n := min(len(d.rest), len(w.rest))
	p.mu.Unlock()
	err := pair(d, w, n)
	p.mu.Lock()
	if err != nil {
		panic(fmt.Sprintf("sha256x2: crypto/sha256 is not what it was when the program started: %v", err))
	}
	p.hashed[1] += 2 * uint64(n)
	p.visited(w, time.Now())
	w.wake <- struct{}{}
}

// queue waits until a slice that is hashed alone ends, and for what happens to d then.
func (p *Pool) queue(d *digest) {
	p.waiting, p.queued = d, true
	p.mu.Unlock()
	<-d.wake
	p.mu.Lock()
}

// linger waits for a partner to come, and for what happens to d then, but not for longer than d may.
func (p *Pool) linger(d *digest, now time.Time) {
	wait := min(patience, d.credit)
	d.lingers = now
	p.waiting, p.queued = d, false
	p.mu.Unlock()
	if d.timer == nil {
		d.timer = time.NewTimer(wait)
	} else {
		d.timer.Reset(wait)
	}
	select {
	case <-d.wake:
		d.timer.Stop()
		p.mu.Lock()
		return
	case <-d.timer.C:
	}
	p.mu.Lock()
	if p.waiting == d {
		p.waiting, d.credit = nil, 0
		return
	}
	p.mu.Unlock()
	<-d.wake // somebody came at the last moment
	p.mu.Lock()
}
