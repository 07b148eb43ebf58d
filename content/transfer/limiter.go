package transfer

import (
	"context"
	"slices"
	"sync"
)

// limiter bounds the connections to each host over all transfers. A free connection goes to the waiting transfer
// that has the fewest on that host, and among equals to the one that waits longest: a large blob cannot starve the others.
type limiter struct {
	limit int

	mu    sync.Mutex
	hosts map[string]*hostSlots
}

type hostSlots struct {
	used    int
	by      map[*job]int
	waiting []*slotWaiter
}

type slotWaiter struct {
	who     *job
	granted chan struct{} // closed under limiter.mu
}

func newLimiter(limit int) *limiter { return &limiter{limit: limit, hosts: map[string]*hostSlots{}} }

// acquire waits for a connection to host. The caller calls release exactly once when err is nil.
func (l *limiter) acquire(ctx context.Context, host string, who *job) error {
	l.mu.Lock()
	h := l.hosts[host]
	if h == nil {
		h = &hostSlots{by: map[*job]int{}}
		l.hosts[host] = h
	}
	w := &slotWaiter{who: who, granted: make(chan struct{})}
	h.waiting = append(h.waiting, w)
	l.grant(host, h)
	l.mu.Unlock()

	select {
	case <-w.granted:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.Index(h.waiting, w); i >= 0 {
		h.waiting = slices.Delete(h.waiting, i, i+1)
		l.grant(host, h)
	} else {
		l.put(host, h, who) // granted in the meantime
	}
	return context.Cause(ctx)
}

func (l *limiter) release(host string, who *job) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(host, l.hosts[host], who)
}

func (l *limiter) put(host string, h *hostSlots, who *job) {
	h.used--
	if h.by[who]--; h.by[who] == 0 {
		delete(h.by, who)
	}
	l.grant(host, h)
}

// grant hands out free slots. Called with mu held.
func (l *limiter) grant(host string, h *hostSlots) {
	for h.used < l.limit && len(h.waiting) > 0 {
		best := 0
		for i, w := range h.waiting {
			if h.by[w.who] < h.by[h.waiting[best].who] {
				best = i
			}
		}
		w := h.waiting[best]
		h.waiting = slices.Delete(h.waiting, best, best+1)
		h.used++
		h.by[w.who]++
		close(w.granted)
	}
	if h.used == 0 && len(h.waiting) == 0 {
		delete(l.hosts, host)
	}
}
