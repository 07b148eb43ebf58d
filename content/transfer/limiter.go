package transfer

import (
	"cmp"
	"context"
	"slices"
	"sync"
	"time"
)

// HostLimits bound the requests under way. Below one means default.
type HostLimits struct {
	// PerHost is the most for one host; how many it really gets is found out below that. Default 32.
	PerHost int
	// Total is the most for all hosts together. Default 64.
	Total int
}

// Hosts is what a process knows of the hosts it fetches from, and shares out connections to them: over all transfers of
// all managers that were given it. Safe for concurrent use.
type Hosts struct {
	limits HostLimits

	mu      sync.Mutex // taken after job.mu
	hosts   map[string]*hostState
	used    int
	waiting []*waiter // in the order in which they came
}

const (
	// Names of hosts come from labels, so there is no natural bound.
	knownHosts = 256
	// What a host was worth so long ago says nothing any more.
	forgetHost = 10 * time.Minute
	// The longest that a host is obeyed with Retry-After.
	maxRetryAfter = 2 * time.Minute
	// Mirrors that failed for so long are no reason to wait with the next tier.
	downTime = 2 * time.Second
	// For so long nobody asks a host again where nobody listens.
	absentTime = 15 * time.Second
	// A host that was waited for in vain is left alone for so long at first, if another one is well: a chunk that it is
	// asked for is held up while nothing comes.
	shunTime = 15 * time.Second
	// A host that is so many times slower than another is a last resort.
	farSlower = 10
	// Paces are compared for so long.
	paceTime = time.Minute
)

// NewHosts makes one for a process.
func NewHosts(l HostLimits) *Hosts {
	if l.PerHost < 1 {
		l.PerHost = 32
	}
	if l.Total < 1 {
		l.Total = 64
	}
	l.PerHost = min(l.PerHost, l.Total)
	return &Hosts{limits: l, hosts: map[string]*hostState{}}
}

// hostState is a host as all transfers of the process see it. Guarded by Hosts.mu.
type hostState struct {
	name    string
	control control
	used    int
	images  map[string]int // connections by what they are for
	jobs    map[*job]int
	idle    time.Time // when it was used last

	until   time.Time // no request before
	told    time.Time // the same, as far as the host said so itself
	fails   int       // rounds of failures in a row; those that began before a failure was seen count with it
	failed  time.Time // when the last one was counted
	down    time.Time // when the first of them was asked
	shunned time.Time // not asked before, while another host is well
	lastErr error     // of them; nil while the host is well
	absent  error     // nobody listens there

	ranges bool    // it honours them
	pace   float64 // of one connection lately, in bytes a second; 0 if not known
	paced  time.Time
}

// waiter is a transfer that wants more connections.
type waiter struct {
	job     *job
	want    int          // so many more
	hosts   []*hostState // to any of them, the first that has room
	granted chan *hostState
	again   chan struct{} // look again: a host is to be left alone for a while
}

// mostWanted is how many connections a waiter can get at once.
const mostWanted = 16

func newWaiter(j *job) *waiter {
	return &waiter{job: j, granted: make(chan *hostState, mostWanted), again: make(chan struct{}, 1)}
}

// host returns what is known of a host.
func (hs *Hosts) host(name string) *hostState {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	now := time.Now()
	h := hs.hosts[name]
	if h == nil || h.used == 0 && now.Sub(h.idle) > forgetHost {
		if h == nil && len(hs.hosts) >= knownHosts {
			hs.evict()
		}
		h = &hostState{name: name, control: newControl(hs.limits.PerHost), images: map[string]int{}, jobs: map[*job]int{}}
		hs.hosts[name] = h
	}
	h.idle = now
	return h
}

// evict drops the idle host that was not used for longest. Transfers that still know it lose nothing. Called with mu
// held.
func (hs *Hosts) evict() {
	var oldest *hostState
	for _, h := range hs.hosts {
		if h.used == 0 && (oldest == nil || h.idle.Before(oldest.idle)) {
			oldest = h
		}
	}
	if oldest != nil {
		delete(hs.hosts, oldest.name)
	}
}

// acquire waits for a connection to one of the hosts; nil when changed was closed or the time is over: the caller then
// looks again at what it wants, without losing its place if it comes back with the same waiter. The caller calls
// release once for each host it got, and leave at the end.
func (hs *Hosts) acquire(ctx context.Context, w *waiter, hosts []*hostState, want int, changed <-chan struct{}, wait time.Duration) (*hostState, error) {
	hs.want(w, hosts, want)
	defer hs.want(w, nil, 0)
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case h := <-w.granted:
		return h, nil
	default:
	}
	select {
	case h := <-w.granted:
		return h, nil
	case <-changed:
		return nil, nil
	case <-w.again:
		return nil, nil
	case <-timer.C:
		return nil, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// want says what a waiter waits for from now on, beside what it was granted and has not taken.
func (hs *Hosts) want(w *waiter, hosts []*hostState, n int) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	w.hosts, w.want = hosts, min(n, mostWanted)-len(w.granted)
	if len(hosts) == 0 {
		return
	}
	if !slices.Contains(hs.waiting, w) {
		hs.waiting = append(hs.waiting, w)
	}
	hs.grant(time.Now())
}

// leave takes a waiter out, and back what it was given and has not taken.
func (hs *Hosts) leave(w *waiter) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.waiting = slices.DeleteFunc(hs.waiting, func(o *waiter) bool { return o == w })
	for len(w.granted) > 0 {
		hs.put(<-w.granted, w.job)
	}
	hs.grant(time.Now())
}

func (hs *Hosts) release(h *hostState, who *job) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	hs.put(h, who)
	hs.grant(time.Now())
}

func (hs *Hosts) put(h *hostState, who *job) {
	hs.used--
	h.used--
	h.idle = time.Now()
	less(h.images, who.image)
	less(h.jobs, who)
}

func less[K comparable](m map[K]int, k K) {
	if m[k]--; m[k] == 0 {
		delete(m, k)
	}
}

// grant hands out connections while there is room. Called with mu held.
func (hs *Hosts) grant(now time.Time) {
	for {
		var best *waiter
		var at *hostState
		for _, w := range hs.waiting {
			if w.want <= 0 {
				continue
			}
			i := slices.IndexFunc(w.hosts, func(h *hostState) bool { return hs.room(h, w.job, now) })
			if i >= 0 && (best == nil || before(w, w.hosts[i], best, at)) {
				best, at = w, w.hosts[i]
			}
		}
		if best == nil {
			break
		}
		if best.want--; best.want > 0 { // behind the others
			hs.waiting = append(slices.DeleteFunc(hs.waiting, func(o *waiter) bool { return o == best }), best)
		} else {
			hs.waiting = slices.DeleteFunc(hs.waiting, func(o *waiter) bool { return o == best })
		}
		hs.used++
		at.used++
		at.images[best.job.image]++
		at.jobs[best.job]++
		best.granted <- at // has room
	}
	for _, h := range hs.hosts {
		if h.used > 0 || h.control.waiting {
			h.control.press(now, h.used >= h.control.limit && hs.wanted(h))
		}
	}
}

// before says whether w comes before v: with the host, image, or transfer that has fewer connections, or the one that
// waits longer.
func before(w *waiter, at *hostState, v *waiter, vat *hostState) bool {
	hosts := 0
	if at != vat {
		hosts = cmp.Compare(at.used, vat.used)
	}
	return cmp.Or(hosts,
		cmp.Compare(at.images[w.job.image], vat.images[v.job.image]),
		cmp.Compare(at.jobs[w.job], vat.jobs[v.job])) < 0
}

func (hs *Hosts) wanted(h *hostState) bool {
	return slices.ContainsFunc(hs.waiting, func(w *waiter) bool { return w.want > 0 && slices.Contains(w.hosts, h) })
}

// room says whether a transfer may ask a host for more. Called with mu held.
func (hs *Hosts) room(h *hostState, who *job, now time.Time) bool {
	if h.used >= h.control.limit || hs.used >= hs.limits.Total || h.until.After(now) {
		return false
	}
	if h.fails > 0 && h.jobs[who] > 0 {
		return false // one request finds out whether the host is well again, or has trouble with one blob only
	}
	// The last quarter is for hosts that have few, so that slow ones cannot hold everything.
	return h.used < max(1, hs.limits.Total/8) || hs.used < hs.limits.Total-hs.limits.Total/4
}

// share is about how many connections to a host a transfer will have.
func (hs *Hosts) share(h *hostState) int {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	return max(1, h.control.limit/max(1, len(h.jobs)))
}

// view is what a transfer wants to know of a host.
type view struct {
	until  time.Time
	down   bool // has failed for some time, or will not answer for some
	well   bool // did not fail last
	shun   bool // to find out whether it is well again would hold up a chunk
	told   bool // said that it wants to be left alone now
	pace   float64
	absent error

	latency time.Duration
}

func (hs *Hosts) look(h *hostState) view {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	now := time.Now()
	v := view{until: h.until, told: h.told.After(now), well: h.fails == 0, absent: h.absent, latency: h.control.latency}
	v.shun = h.fails > 0 && h.shunned.After(now)
	v.down = h.fails > 0 && now.Sub(h.down) >= downTime || h.until.Sub(now) >= downTime
	if now.Sub(h.paced) < paceTime {
		v.pace = h.pace
	}
	if h.absent != nil && now.Sub(h.failed) > absentTime {
		v.absent = nil // perhaps somebody is there again
	}
	return v
}

// trouble is the last error of a host that is not well.
func (hs *Hosts) trouble(h *hostState) error {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	return h.lastErr
}

func (hs *Hosts) answered(h *hostState, took time.Duration) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h.control.answered(took)
}

// arrived counts bytes of a host.
func (hs *Hosts) arrived(h *hostState, n int64) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	now := time.Now()
	limit, ill := h.control.limit, h.fails > 0
	h.fails, h.lastErr, h.absent = 0, nil, nil
	h.control.arrived(now, n, h.used)
	if ill || h.control.limit > limit {
		hs.grant(now)
	}
}

// brought notes how fast one connection was.
func (hs *Hosts) brought(h *hostState, n int64, took time.Duration) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	now := time.Now()
	pace := float64(n) / max(took, time.Millisecond).Seconds()
	if h.pace > 0 && now.Sub(h.paced) < paceTime {
		pace = (h.pace + pace) / 2
	}
	h.pace, h.paced = pace, now
}

// failure books a request that began at begun and brought got bytes before it failed.
func (hs *Hosts) failure(h *hostState, begun time.Time, got int64, err error) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	now := time.Now()
	after := min(retryAfter(err), maxRetryAfter)
	wait := time.Duration(0) // a connection that brought much is replaced at once
	switch {
	case got >= goodProgress && !isOurs(err):
	case got > 0 && !isOurs(err):
		wait = backoff(1)
	case begun.After(h.failed): // else it failed together with one that is counted
		if h.fails++; h.fails == 1 {
			h.down = begun
		}
		if isOurs(err) {
			h.down = now.Add(-downTime) // it was waited for long enough
			h.shunned = now.Add(shunTime << min(h.fails-1, 3))
		}
		h.failed = now
		wait = backoff(h.fails)
		fallthrough
	default:
		h.lastErr = err
	}
	if after > 0 {
		h.told = later(h.told, now.Add(after))
	}
	if until := now.Add(max(wait, after)); until.After(h.until) {
		h.until = until
		hs.nudge(h)
	}
	if h.fails >= absentTries && isAbsent(err) {
		h.absent = err
	}
	h.control.fall(now, h.used, got == 0 && !isOurs(err), after > 0)
}

// nudge has those who wait for a host look again at when they may ask it. Called with mu held.
func (hs *Hosts) nudge(h *hostState) {
	for _, w := range hs.waiting {
		if slices.Contains(w.hosts, h) && len(w.again) == 0 {
			w.again <- struct{}{}
		}
	}
}

func (hs *Hosts) honoursRanges(h *hostState) bool {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	return h.ranges
}

func (hs *Hosts) learnRanges(h *hostState, yes bool) {
	hs.mu.Lock()
	defer hs.mu.Unlock()
	h.ranges = yes
}
