package transfer

import (
	"cmp"
	"time"
)

// How many connections a host gets.
//
// Nobody can know beforehand how many connections a host is worth: one that caps each at 25 MB/s wants ten, one behind
// a slow line wants two. So each host has a control that finds out, as TCP does for its window: additive increase and
// multiplicative decrease (Chiu and Jain, 1989; RFC 5681) against overload, and hill climbing on the throughput, as
// TCP Vegas and PCC do, so that it also stops where a host only has no more to give.
//
//   - It looks at windows of 150 ms or five times the latency, whichever is longer, and only at windows in which requests
//     waited for a connection almost all the time: otherwise the limit was not what mattered.
//   - A trial changes the limit, lets the connections settle for a moment, and compares a window with the rate before.
//     A rise must bring a good part of what it adds, or it is undone. The first rises are by a half and are given two
//     windows, should this machine be busy; once one brought nothing they are by an eighth, and a window is three.
//   - A rise that brings nothing is followed by trials of fewer connections: as long as the rate stays, fewer do as
//     well, and a kill or a cut costs less. A latency to the first byte that doubled asks for such a trial, too.
//   - Then it holds still, for half a second at first and twice as long after each fruitless round, and tries again.
//   - 429, 503 and refused connections halve the limit, at most once a window; connections that break in the middle do
//     so once in two seconds. It comes back by one connection a window up to where it was, or to one below where
//     the host said Retry-After.
const (
	startConnections = 8
	// Fewer than this are never tried without need: a blob must not wait for another's chunk.
	fewConnections = 2

	windowMin = 150 * time.Millisecond
	windowMax = 2 * time.Second
	// A window has so many bytes of each connection, if it need not last longer than windowMax for that.
	windowBytes = 128 << 10
	settleMin   = 40 * time.Millisecond
	pauseMin    = 500 * time.Millisecond
	pauseMax    = time.Minute
	breakPause  = 2 * time.Second

	// What a rise must bring, as a part of the connections it adds.
	minGain = 0.3
	// What fewer connections may lose, as a part of the rate.
	maxLoss = 0.04
	// The part of a window in which requests must have waited.
	pressedPart = 0.75
)

// control finds the number of connections for one host. It has no clock and no lock of its own.
type control struct {
	limit, bound int
	latency      time.Duration // until the first byte, smoothed

	// The trial under way: from is the limit before it, 0 if there is none, and rate what that one brought, in bytes a
	// second, 0 if it is not known.
	from    int
	rate    float64
	changed time.Time // when the limit was changed
	gentle  bool      // steps are small
	doubted bool      // the trial brought nothing in its first window
	probe   time.Time // no rise is tried before
	pause   time.Duration
	known   int // the limit to come back to after a fall
	fell    time.Time

	// The window under way. It begins when open.
	open    bool
	begun   time.Time
	bytes   int64
	pressed time.Duration // how long requests waited
	waiting bool          // requests wait now, since
	since   time.Time
	replies int
	delay   time.Duration // until their first bytes, together
	calm    time.Duration // what the delay is when nothing queues
}

func newControl(bound int) control {
	return control{limit: min(startConnections, bound), bound: bound, pause: pauseMin}
}

func (c *control) window() time.Duration {
	w := min(max(windowMin, 5*c.latency), windowMax)
	if c.gentle && c.from != 0 {
		w *= 3 // small steps need a closer look, and there is no hurry
	}
	return w
}

func (c *control) settle() time.Duration { return min(max(settleMin, 2*c.latency), windowMax/2) }

// press notes whether requests wait for a connection from now on.
func (c *control) press(now time.Time, waiting bool) {
	if c.waiting {
		c.pressed += now.Sub(c.since)
	}
	c.waiting, c.since = waiting, now
}

// answered notes how long a reply took to begin.
func (c *control) answered(took time.Duration) {
	c.replies++
	c.delay += took
	if c.latency == 0 {
		c.latency = took
	}
	c.latency = (3*c.latency + took) / 4
}

// arrived counts bytes; used is how many connections are under way. It closes the window when its time is over.
func (c *control) arrived(now time.Time, n int64, used int) {
	c.press(now, c.waiting)
	if !c.open {
		// Connections above a lower limit end with their chunk.
		if c.waiting && used <= c.limit && now.Sub(c.changed) >= c.settle() {
			c.openWindow(now)
		}
		return
	}
	c.bytes += n
	took := now.Sub(c.begun)
	if took < c.window() || c.bytes < int64(c.limit)*windowBytes && took < windowMax {
		return
	}
	rate := float64(c.bytes) / took.Seconds()
	if c.pressed.Seconds() >= pressedPart*took.Seconds() {
		c.judge(now, rate)
	} else if c.from != 0 { // a trial that nobody watched
		c.set(now, c.from)
		c.from = 0
	}
	if c.open {
		c.openWindow(now)
	}
}

func (c *control) openWindow(now time.Time) {
	c.open, c.begun = true, now
	c.bytes, c.pressed, c.replies, c.delay = 0, 0, 0, 0
}

func (c *control) set(now time.Time, limit int) {
	if limit != c.limit {
		c.limit, c.changed, c.open, c.doubted = limit, now, false, false
	}
}

// judge draws the conclusion of a window.
func (c *control) judge(now time.Time, rate float64) {
	switch {
	case c.from == 0:
		c.measured(now, rate)
	case c.limit > c.from && rate >= c.rate*(1+minGain*(float64(c.limit)/float64(c.from)-1)):
		c.rate, c.pause = rate, pauseMin
		c.rise(now)
	case c.limit > c.from && !c.gentle && !c.doubted:
		c.doubted = true // this machine may have been busy with something else
	case c.limit > c.from:
		c.gentle = true
		c.set(now, c.from)
		c.lower(now)
	case rate >= c.rate*(1-maxLoss):
		c.lower(now)
	default:
		c.set(now, c.from)
		c.hold(now)
	}
}

// measured is told the rate of a limit that is not on trial.
func (c *control) measured(now time.Time, rate float64) {
	if c.rate == 0 {
		c.rate = rate
	}
	c.rate = (3*c.rate + rate) / 4
	switch {
	case c.limit < c.known:
		c.rate = 0
		c.set(now, c.limit+1)
	case !now.Before(c.probe):
		c.rise(now)
	case c.slower():
		c.lower(now)
	}
}

// slower says whether the host takes much longer to answer than it did.
func (c *control) slower() bool {
	const enough = 3
	if c.replies < enough {
		return false
	}
	delay := c.delay / time.Duration(c.replies)
	if c.calm == 0 || delay < c.calm {
		c.calm = delay
	}
	grown := delay > 2*c.calm+settleMin
	if grown {
		c.calm = delay // should fewer connections be no help, this is how the host is
	}
	return grown
}

func (c *control) rise(now time.Time) {
	step := c.limit / 2
	if c.gentle {
		step = c.limit / 8
	}
	to := min(c.limit+max(step, 1), c.bound)
	if to == c.limit {
		c.hold(now)
		return
	}
	c.from = c.limit
	c.set(now, to)
}

func (c *control) lower(now time.Time) {
	to := max(c.limit*3/4, min(fewConnections, c.limit))
	if to == c.limit {
		c.hold(now)
		return
	}
	c.from = c.limit
	c.set(now, to)
}

func (c *control) hold(now time.Time) {
	c.from = 0
	c.probe = now.Add(c.pause)
	c.pause = min(2*c.pause, pauseMax)
	c.known = 0
}

// fall answers trouble with used connections under way. hard: a request was refused; told: with a time to come back.
func (c *control) fall(now time.Time, used int, hard, told bool) {
	if pause := windowMin; now.Sub(c.fell) < pause || !hard && now.Sub(c.fell) < max(pause, breakPause) {
		return
	}
	level := min(c.limit, max(used, 1))
	switch {
	case told:
		c.known = level - 1
		c.probe = now.Add(c.pause)
		c.pause = min(2*c.pause, pauseMax)
	case c.limit > c.known:
		c.known = cmp.Or(c.from, c.limit)
	}
	c.fell, c.from, c.rate, c.gentle = now, 0, 0, true
	c.set(now, max(1, level/2))
}
