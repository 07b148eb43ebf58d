package transfer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sync/errgroup"
)

const (
	chunkMin   = 1 << 20
	chunkStart = 8 << 20
	chunkMax   = 64 << 20
	// A request should bring bytes for chunkTime and for chunkLatencies times as long as its first byte took: long
	// beside what it costs the host (2 ms of CPU in a registry, whatever the size), short enough that the frontier
	// keeps moving.
	chunkTime      = 400 * time.Millisecond
	chunkLatencies = 15
	// runAheadChunks is how many chunks of each connection may lie beyond the frontier.
	runAheadChunks = 4
)

// aim is how much a request should ask of a host, in bytes: what it brings in that time.
func (j *job) aim(h *hostState) int64 {
	v := j.shared.hosts.look(h)
	if v.pace == 0 {
		return chunkStart
	}
	return int64(min(v.pace*max(chunkTime, chunkLatencies*v.latency).Seconds(), chunkMax))
}

// chunk is how much the next request asks of a host, in bytes, if the transfer has n connections: no more than half of
// a connection's part of what nobody fetches yet. So the last chunks are the smallest and the connections end together.
func (j *job) chunk(h *host, n int) int64 {
	if j.opts.ChunkSize > 0 {
		return j.opts.ChunkSize
	}
	size := min(j.aim(h.shared), j.ledger.unclaimed()/int64(2*n))
	if _, ok := j.lag(); ok {
		size = min(size, readChunk)
	}
	return max(size/blockSize*blockSize, chunkMin)
}

// runAhead is how far beyond the frontier a chunk may start, in bytes: on disk, not in memory. Called with mu held.
func (j *job) runAhead() int64 {
	n, chunk := startConnections, int64(chunkStart)
	for _, h := range j.hosts {
		if h.conns > 0 {
			n, chunk = max(n, h.conns), max(chunk, j.aim(h.shared))
		}
	}
	if j.opts.ChunkSize > 0 {
		chunk = j.opts.ChunkSize
	}
	return runAheadChunks * chunk * int64(min(n, j.shared.hosts.limits.PerHost))
}

// horizon is where no chunk may start yet. What is on disk and being checked does not hold up what is fetched meanwhile.
// Called with mu held.
func (j *job) horizon() int64 {
	if j.backlogged() {
		return 0
	}
	return j.notFarAhead(j.ledger.wanted()) + j.runAhead()
}

// dispatch makes one connection after the other until nothing is missing. Each gets its own goroutine.
func (j *job) dispatch(ctx context.Context, g *errgroup.Group) error {
	hosts := j.shared.hosts
	w := newWaiter(j)
	defer hosts.leave(w)
	for {
		j.mu.Lock()
		ask, wait, err := j.askable()
		done, changed := j.ledger.done(), j.changed
		want := int(min(j.ledger.unclaimed()/chunkMin+1, mostWanted))
		j.queued = !done && j.held(ask)
		j.mu.Unlock()
		if done || err != nil {
			return err
		}
		h, err := hosts.acquire(ctx, w, ask, want, changed, wait)
		if err != nil {
			return err
		}
		if h == nil {
			continue
		}
		c := j.begin(h)
		if c == nil {
			hosts.release(h, j)
			continue
		}
		g.Go(func() error { return unlessAllThere(j.connection(ctx, c)) })
	}
}

// askable lists the hosts that may be asked for a chunk, in the order of their sources, none if there is no chunk to
// ask for. It also says how long that holds unless something changes. Called with mu held.
func (j *job) askable() ([]*hostState, time.Duration, error) {
	wait := time.Duration(math.MaxInt64)
	if !j.claimable() && !j.overtake() {
		if j.open > 0 {
			wait = overtakeTick
		}
		if j.backlogged() {
			wait = backlogTick
		}
		return nil, wait, nil
	}
	now, alive, well := time.Now(), false, false
	var ask, last []*hostState // last: only if nobody else is well
	for _, tier := range j.tiers() {
		down := true
		for _, h := range tier {
			v := j.shared.hosts.look(h.shared)
			if h.received == 0 && v.absent != nil {
				j.drop(h, v.absent)
				continue
			}
			quiet := j.quiet(h, now)
			alive, down = true, down && (v.down || quiet)
			well = well || v.well && !quiet && !v.until.After(now)
			if v.until.After(now) {
				wait = min(wait, v.until.Sub(now))
			}
			switch {
			case h.conns > 0 && (h.ranges != rangesYes || j.farSlower(h)):
			case v.shun || quiet:
				last = append(last, h.shared)
			default:
				ask = append(ask, h.shared)
			}
		}
		wait = min(wait, downTime)
		if !down {
			break
		}
	}
	if !well {
		ask = append(ask, last...)
	}
	// What failed last is asked only if there is room nowhere else.
	slices.SortStableFunc(ask, func(a, b *hostState) int { return cmp.Compare(j.ill(a), j.ill(b)) })
	if !alive && len(j.ledger.live) == 0 {
		j.doomed = j.only == ""
		return nil, 0, j.noSource()
	}
	return ask, wait, nil
}

// tiers lists the hosts that are left, those to be asked first in the first list. Called with mu held.
func (j *job) tiers() [][]*host {
	byTier := map[int][]*host{}
	for _, s := range j.sources {
		if j.usable(s) && !slices.Contains(byTier[s.Tier()], s.host) {
			byTier[s.Tier()] = append(byTier[s.Tier()], s.host)
		}
	}
	var tiers [][]*host
	for _, tier := range slices.Sorted(maps.Keys(byTier)) {
		tiers = append(tiers, byTier[tier])
	}
	return tiers
}

// quiet says whether a host is asked for something and brings nothing: time to ask the next tier, without giving up
// what it may still send. Called with mu held.
func (j *job) quiet(h *host, now time.Time) bool {
	asked := false
	for c := range j.conns {
		if c.src.host == h {
			if now.Sub(c.last) < downTime {
				return false
			}
			asked = true
		}
	}
	return asked
}

// ill is 0 for a host that is well and 1 for one that failed last.
func (j *job) ill(h *hostState) int {
	if j.shared.hosts.look(h).well {
		return 0
	}
	return 1
}

// farSlower says whether another host is so much faster that this one gets no more than a connection. Called with mu
// held.
func (j *job) farSlower(h *host) bool {
	pace := j.shared.hosts.look(h.shared).pace
	return pace > 0 && j.fastest() > farSlower*pace
}

// fastest is the pace of the best host that may be asked. Called with mu held.
func (j *job) fastest() float64 {
	best := 0.0
	for _, s := range j.sources {
		if j.usable(s) {
			best = max(best, j.shared.hosts.look(s.host.shared).pace)
		}
	}
	return best
}

// held says whether it is for other transfers that this one has to wait: then nobody is to blame for it. Called with mu
// held.
func (j *job) held(ask []*hostState) bool {
	return slices.ContainsFunc(ask, func(h *hostState) bool {
		v := j.shared.hosts.look(h)
		return v.well && !v.until.After(time.Now())
	})
}

// claimable says whether a chunk may be asked for now. Called with mu held.
func (j *job) claimable() bool {
	return len(j.ledger.gaps) > 0 && j.ledger.gaps[0].off < j.horizon()
}

// drop ends all sources of a host, with the error that another transfer had from it. Called with mu held.
func (j *job) drop(h *host, err error) {
	for _, s := range j.sources {
		if s.host == h && s.gone == nil {
			s.gone = err
		}
	}
}

// usable says whether a source may be asked. Called with mu held.
func (j *job) usable(s *source) bool {
	if s.gone != nil || j.only != "" {
		return s.gone == nil && j.only == s.host.name
	}
	return !j.shared.lied(s.host.name) || !j.otherTrusted()
}

// noSource says why nobody is left. Called with mu held.
func (j *job) noSource() error {
	var gone []error
	for _, s := range j.sources {
		if s.gone != nil && (j.only == "" || j.only == s.host.name) {
			gone = append(gone, s.gone)
		}
	}
	if len(gone) == 0 {
		return fmt.Errorf("%w: no source was given: %w", errNoSource, errdefs.ErrNotFound)
	}
	if i := slices.IndexFunc(gone, isWrongSize); i >= 0 && !slices.ContainsFunc(gone, func(err error) bool {
		return !isWrongSize(err) && !isAbsent(err)
	}) {
		// Whoever answered at all says so.
		return fmt.Errorf("%w: %w", errNoSource, gone[i])
	}
	for i, err := range gone {
		if isWrongSize(err) {
			gone[i] = errors.New(err.Error()) // one host's word against another's: not the transfer's
		}
	}
	return fmt.Errorf("%w: %w", errNoSource, oneLine(gone))
}

// conn is a connection under way. Guarded by job.mu.
type conn struct {
	src    *source
	span   *span
	plain  bool // it asks for the whole blob: the host does not do ranges
	begun  time.Time
	cancel context.CancelCauseFunc

	last  time.Time // when it brought something
	got   int64     // bytes, since begun
	mark  time.Time // where pace is measured from, each second
	since int64     // got at mark
	pace  float64   // of the second before mark, 0 if there is none
	watch time.Time // the same for what counts as a stall
	stood int64
}

// begin claims a chunk for a host that it may be asked of; nil if there is none any more or the host may not be asked
// now.
func (j *job) begin(at *hostState) *conn {
	n := j.shared.hosts.share(at)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.queued = false
	i := slices.IndexFunc(j.sources, func(s *source) bool { return s.host.shared == at && j.usable(s) })
	if i < 0 {
		return nil
	}
	src := j.sources[i]
	h := src.host
	if h.ranges != rangesYes && h.conns > 0 {
		return nil
	}
	s := j.ledger.claim(j.chunk(h, max(n, j.open+1)), j.horizon())
	if s == nil {
		return nil
	}
	h.conns++
	h.attempts++
	j.open++
	if j.phase == PhaseLock {
		j.phase = PhaseWaiting
	}
	now := time.Now()
	c := &conn{src: src, span: s, plain: h.ranges == rangesNo, begun: now, last: now, mark: now, watch: now}
	j.conns[c] = struct{}{}
	return c
}

// connection makes one request and stores what it brings. Only what ends the whole transfer is an error.
func (j *job) connection(ctx context.Context, c *conn) error {
	defer j.shared.hosts.release(c.src.host.shared, j)
	got, err := j.exchange(ctx, c)
	return j.end(ctx, c, got, err)
}

// end gives back what the connection did not bring and judges the source.
func (j *job) end(ctx context.Context, c *conn, got int64, err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.wake()
	src := c.src
	j.ledger.release(c.span)
	delete(j.conns, c)
	src.host.conns--
	j.open--
	if n := c.got - c.since; n >= blockSize {
		j.shared.hosts.brought(src.host.shared, n, time.Since(c.mark))
		j.best = max(j.best, j.fastest())
	}
	var local *localError
	if errors.As(err, &local) {
		return diskError(j.folder.path, local.err)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err == nil {
		src.host.fails = 0
		return nil
	}
	before := src.host.ranges
	j.lastErr = src.failed(got, c.plain, err)
	mistaken := src.host.ranges != before
	if mistaken {
		j.shared.hosts.learnRanges(src.host.shared, false)
	}
	if !isFinal(err) {
		j.shared.hosts.failure(src.host.shared, c.begun, got, j.lastErr)
	}
	l := log.G(ctx).WithField("digest", j.blob.Digest).WithField("host", src.host.name).WithError(j.lastErr)
	switch {
	case errors.Is(src.gone, errdefs.ErrFailedPrecondition):
		l.Warn("host contradicts itself and is not asked for this blob any more")
	case mistaken:
		l.Warn("host mistakes ranges and is only asked for the whole of this blob")
	case src.gone != nil:
		l.Debug("host is not asked for this blob any more")
	default:
		l.Debug("connection failed, trying again")
	}
	return nil
}
