package transfer

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

const (
	chunkMin     = 1 << 20
	chunkDefault = 8 << 20
	chunkMax     = 16 << 20
	// chunkTime is how long a request should bring bytes: long beside the time until its first byte and beside what it
	// costs the host, short enough that the frontier keeps moving.
	chunkTime = 500 * time.Millisecond
)

// workers is how many connections the blob may use at once: one for a blob of one chunk.
func (j *job) workers() int {
	chunks := (j.blob.Size + j.chunk() - 1) / j.chunk()
	return int(min(int64(j.opts.ConnectionsPerHost), chunks))
}

// chunk is how much one of the first requests asks for, in bytes.
func (j *job) chunk() int64 {
	if j.opts.ChunkSize > 0 {
		return j.opts.ChunkSize
	}
	// A few chunks for each connection, so that they end together.
	share := j.blob.Size / int64(4*j.opts.ConnectionsPerHost)
	return min(max(blockEnd(share), chunkMin), chunkDefault)
}

// nextChunk is how much the next request asks of a host, in bytes: more of a fast one, since each request costs it
// time (2 ms of CPU in a registry, whatever the size), but no more than one connection's share of the blob.
// Called with mu held.
func (j *job) nextChunk(h *host) int64 {
	chunk := j.chunk()
	if j.opts.ChunkSize > 0 || h.pace == 0 {
		return chunk
	}
	share := blockEnd(j.blob.Size / int64(j.opts.ConnectionsPerHost))
	return max(chunk, min(int64(h.pace*chunkTime.Seconds()), share, chunkMax))
}

// runAhead is how far beyond the frontier a chunk may start, in bytes.
func (j *job) runAhead() int64 { return 4 * int64(j.opts.ConnectionsPerHost) * j.chunk() }

// horizon is where no chunk may start yet. What is on disk and being checked does not hold up what is fetched meanwhile.
// Called with mu held.
func (j *job) horizon() int64 { return j.ledger.wanted() + j.runAhead() }

// worker fetches chunk after chunk until nothing is missing.
func (j *job) worker(ctx context.Context) error {
	buf := make([]byte, blockSize)
	for {
		src, err := j.next(ctx)
		if src == nil || err != nil {
			return err
		}
		if err := j.connection(ctx, src, buf); err != nil {
			return err
		}
	}
}

// next waits until there is a chunk to fetch and a source to ask; nil when everything is there.
func (j *job) next(ctx context.Context) (*source, error) {
	for {
		j.mu.Lock()
		src, wait, err := j.pick()
		done, changed := j.ledger.done(), j.changed
		j.mu.Unlock()
		if done || src != nil || err != nil {
			return src, err
		}
		timer := time.NewTimer(wait)
		select {
		case <-changed:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, context.Cause(ctx)
		}
		timer.Stop()
	}
}

// pick chooses the source of the next request: the first that may be asked now. Otherwise it says how long to wait
// unless something changes. Called with mu held.
func (j *job) pick() (*source, time.Duration, error) {
	if len(j.ledger.gaps) == 0 || j.ledger.gaps[0].off >= j.horizon() {
		return nil, math.MaxInt64, nil
	}
	now, wait, alive := time.Now(), time.Duration(math.MaxInt64), false
	for _, s := range j.sources {
		if !j.usable(s) {
			continue
		}
		alive = true
		switch h := s.host; {
		case h.until.After(now):
			wait = min(wait, h.until.Sub(now))
		case h.ranges == rangesUnknown && h.conns > 0:
			return nil, wait, nil // its first reply says how to go on
		case h.ranges == rangesNo && h.conns > 0:
		default:
			return s, 0, nil
		}
	}
	if !alive && len(j.ledger.live) == 0 {
		j.doomed = j.only == ""
		return nil, 0, j.noSource()
	}
	return nil, wait, nil
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

// connection makes one request of a source and stores what it brings. Only what ends the whole transfer is an error.
func (j *job) connection(ctx context.Context, src *source, buf []byte) error {
	host := src.host.name
	j.count(&j.queued, 1)
	err := j.shared.conns.acquire(ctx, host, j)
	j.count(&j.queued, -1)
	if err != nil {
		return err
	}
	defer j.shared.conns.release(host, j)
	s := j.begin(src)
	if s == nil {
		return nil
	}
	got, err := j.exchange(ctx, src, s, buf)
	return j.end(ctx, src, s, got, err)
}

func (j *job) count(n *int, d int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	*n += d
}

// begin claims a chunk for a source; nil if there is none any more or the source may not be asked now.
func (j *job) begin(src *source) *span {
	j.mu.Lock()
	defer j.mu.Unlock()
	h := src.host
	if !j.usable(src) || h.until.After(time.Now()) || (h.ranges != rangesYes && h.conns > 0) {
		return nil
	}
	s := j.ledger.claim(j.nextChunk(h), j.horizon())
	if s == nil {
		return nil
	}
	h.conns++
	h.attempts++
	j.open++
	if j.phase == PhaseLock {
		j.phase = PhaseWaiting
	}
	return s
}

// end gives back what the connection did not bring and judges the source.
func (j *job) end(ctx context.Context, src *source, s *span, got int64, err error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	defer j.wake()
	j.ledger.release(s)
	src.host.conns--
	j.open--
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
	j.lastErr = src.failed(got, err)
	l := log.G(ctx).WithField("digest", j.blob.Digest).WithField("host", src.host.name).WithError(j.lastErr)
	switch {
	case errors.Is(src.gone, errdefs.ErrFailedPrecondition):
		l.Warn("host contradicts itself and is not asked for this blob any more")
	case src.gone != nil:
		l.Debug("host is not asked for this blob any more")
	default:
		l.Debug("connection failed, trying again")
	}
	return nil
}
