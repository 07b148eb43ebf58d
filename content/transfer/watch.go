package transfer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containerd/errdefs"
)

// errNoProgress: no host brought anything for too long.
var errNoProgress = errors.New("no progress")

// watch ends the transfer when nothing moves for too long. Time spent only queueing for a connection does not count:
// it is not the host's fault.
func (j *job) watch(ctx context.Context, stop context.CancelCauseFunc) {
	for {
		limit := j.opts.GiveUp
		if j.received.Load() == 0 && !j.answered() {
			limit = min(limit, j.opts.FirstContact)
		}
		idle := time.Since(time.Unix(0, j.progress.Load()))
		if idle >= limit {
			stop(j.stuck(limit))
			return
		}
		tick := min(limit-idle, max(limit/10, time.Millisecond))
		began := time.Now()
		if sleep(ctx, tick) != nil {
			return
		}
		if late := time.Since(began) - tick; late > tick {
			j.progress.Add(int64(late)) // this process was stopped: what came meanwhile waits to be read
		}
		if j.queueing() {
			j.progress.Add(int64(tick))
		}
	}
}

func (j *job) queueing() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.open == 0 && j.queued
}

// answered says whether a host said at least when to come back, to this transfer or to another one: it is there.
func (j *job) answered() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, h := range j.hosts {
		j.told = j.told || j.shared.hosts.look(h.shared).told
	}
	return j.told
}

// stuck decides that the transfer ends for lack of progress, and says why. A host that is asked alone ends only its
// turn.
func (j *job) stuck(limit time.Duration) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.doomed = j.only == ""
	last := j.lastErr
	for _, s := range j.sources {
		if err := j.shared.hosts.trouble(s.host.shared); last == nil && err != nil {
			last = err // of another transfer
		}
	}
	if last == nil {
		last = fmt.Errorf("%s: no reply", j.asked())
	}
	return fmt.Errorf("%w for %s, %d of %d bytes are there: %w: %w",
		errNoProgress, limit, j.ledger.there(), j.blob.Size, errdefs.ErrUnavailable, last)
}

// asked names the hosts and how often they were asked. Called with mu held.
func (j *job) asked() string {
	text := "no host"
	for i, s := range j.sources {
		if i == 0 {
			text = ""
		} else {
			text += ", "
		}
		text += fmt.Sprintf("host %s, attempt %d", s.host.name, s.host.attempts)
	}
	return text
}

const (
	overtakeTick = 250 * time.Millisecond
	// A connection is overtaken when it is so many times slower than another would be, and that would save so much time.
	overtakePace = 4
	overtakeGain = time.Second / 2
	// What stands still for so long is asked for again, at first; twice as long the next time.
	overtakeStill = 3 * time.Second
	// So slow is not worth having while there is a host that was never asked, in bytes a second.
	trickle = 8 << 10
)

// clock keeps the pace of a connection that brought n bytes. One that trickles while others were far faster has
// stalled: another try has a chance to be better. A link that always was slow is left alone. One that trickles by any
// measure is held against the best there was: where nobody else brings anything, the hosts' pace is what it brings.
// Called with mu held.
func (j *job) clock(c *conn, n int64) {
	now := time.Now()
	if c.got == 0 {
		c.mark, c.since = now, n // until now it was latency
	}
	c.last, c.got = now, c.got+n
	if d := now.Sub(c.mark); d >= time.Second {
		c.pace = float64(c.got-c.since) / d.Seconds()
		j.best = max(j.best, j.fastest())
		j.shared.hosts.brought(c.src.host.shared, c.got-c.since, d)
		c.mark, c.since = now, c.got
	}
	d := now.Sub(c.watch)
	if d < j.opts.Stall {
		return
	}
	pace := float64(c.got-c.stood) / d.Seconds()
	c.watch, c.stood = now, c.got
	if pace*farSlower < j.fastest() || pace < trickle && (pace*farSlower < j.best || j.untried()) {
		c.cancel(errTrickles)
	}
}

// untried says whether there is a host that brought nothing yet and did not fail. Called with mu held.
func (j *job) untried() bool {
	return slices.ContainsFunc(j.sources, func(s *source) bool {
		return j.usable(s) && s.host.received == 0 && s.host.fails == 0 && s.host.conns == 0
	})
}

// speed is what a connection brings now, in bytes a second; false if it is too young to tell.
func (c *conn) speed(now time.Time) (float64, bool) {
	young := 2 * time.Second
	if c.pace == 0 && c.got > 0 {
		young = time.Second / 2 // better than nothing
	}
	if d := now.Sub(c.mark); d >= young {
		return float64(c.got-c.since) / d.Seconds(), true
	}
	return c.pace, c.pace > 0
}

// overtake looks for a connection that holds everything up at a time when nothing else can be asked for. It ends one
// that brings nothing, and makes a new gap of the end of what another one would need much longer for than its better;
// that one then stops in time, and what its socket holds beyond is lost. True if there is a chunk to ask for now.
// Called with mu held.
func (j *job) overtake() bool {
	now := time.Now()
	best := j.fastest()
	if best == 0 {
		return false // nobody knows what is fast here
	}
	var slowest *conn
	var split int64
	ended := 0
	longest := overtakeGain
	patience := overtakeStill << min(j.overtaken, 3) // all may stand still for a reason
	for c := range j.conns {
		s := c.span
		speed, known := c.speed(now)
		if _, live := j.ledger.live[s]; !live || !known || c.cancel == nil || speed*overtakePace > best {
			continue
		}
		latency := j.shared.hosts.look(c.src.host.shared).latency
		if now.Sub(c.begun) < overtakePace*latency {
			continue
		}
		if now.Sub(c.last) >= max(patience, overtakePace*latency) {
			ended++
			c.cancel(errOvertaken)
			c.last = now
			continue
		}
		left := float64(s.end - s.off)
		saves := time.Duration(min(left/max(speed, 1)-left/best, 3600) * float64(time.Second))
		at := max(blockEnd(s.off), blockEnd(s.held-1), blockEnd(s.off+int64(left*speed/(speed+best))))
		if saves-latency > longest && at < s.end {
			slowest, split, longest = c, at, saves-latency
		}
	}
	if ended > 0 {
		j.overtaken++
	}
	if slowest == nil {
		return false
	}
	j.ledger.split(slowest.span, split)
	return j.claimable()
}

// oneLine joins errors for people; errors.Is finds each of them.
func oneLine(errs []error) error {
	var all error
	told := map[string]bool{}
	for _, e := range errs {
		switch {
		case told[e.Error()]: // a host that was asked twice and insists
		case all == nil:
			all = e
		default:
			all = fmt.Errorf("%w; %w", all, e)
		}
		told[e.Error()] = true
	}
	return all
}
