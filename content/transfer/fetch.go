package transfer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// errNoSource: nobody is left to ask.
var errNoSource = errors.New("no host serves the blob")

// errAllThere frees workers that still queue for a connection or read what nobody needs.
var errAllThere = errors.New("nothing is missing any more")

// errStalled ends a connection that brings nothing.
var errStalled = fmt.Errorf("connection brought nothing for too long: %w", errdefs.ErrUnavailable)

// receive fetches all that is missing. It returns early when no progress is made.
func (j *job) receive(ctx context.Context, recorded []*check) error {
	if j.blob.Size == 0 {
		return nil
	}
	j.touch() // waiting for the lock and for our turn was nobody's fault
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		j.watch(ctx, stop)
	}()
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return j.recheck(gctx, recorded) })
	wctx, enough := context.WithCancelCause(gctx)
	g.Go(func() error {
		err := j.allThere(gctx)
		enough(errAllThere)
		return err
	})
	for range j.workers() {
		g.Go(func() error {
			if err := j.worker(wctx); !errors.Is(err, errAllThere) {
				return err
			}
			return nil
		})
	}
	err := g.Wait()
	stop(err)
	<-watched
	return err
}

// allThere waits until nothing is missing.
func (j *job) allThere(ctx context.Context) error {
	for {
		j.mu.Lock()
		done, changed := j.ledger.done(), j.changed
		j.mu.Unlock()
		if done {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// localError is trouble on our side, which no other host will cure.
type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() error { return e.err }

// exchange sends one request and stores the reply. got counts bytes that were missing before.
func (j *job) exchange(ctx context.Context, src *source, s *span, buf []byte) (got int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(j.patience(src), func() { cancel(errStalled) })
	defer timer.Stop()
	defer func() {
		if err != nil && errors.Is(context.Cause(ctx), errStalled) {
			err = errStalled
		}
	}()
	off, n := s.off, s.end-s.off
	body, err := src.Open(ctx, off, n)
	if err != nil {
		return 0, err
	}
	defer func() { _ = body.Close() }()
	in := &reader{job: j, host: src.host, body: body, timer: timer, patience: j.opts.Stall}
	switch {
	case body.Off == off && body.N > 0 && body.N <= n:
		j.learn(src.host, rangesYes, n < j.blob.Size)
		begun := time.Now()
		if got, err = j.store(in, s, min(s.end, off+body.N), buf); err == nil {
			j.paced(src.host, got, time.Since(begun))
		}
		return got, err
	case body.Off == 0 && (body.N < 0 || body.N == j.blob.Size):
		if !j.learn(src.host, rangesNo, n < j.blob.Size) {
			return 0, nil // another stream of this host is on its way
		}
		return j.plain(in, s, buf)
	}
	return 0, fmt.Errorf("asked for %d bytes from %d, the reply says %d from %d: %w", n, off, body.N, body.Off, errdefs.ErrFailedPrecondition)
}

// paced notes how fast a reply's body came.
func (j *job) paced(h *host, n int64, took time.Duration) {
	j.mu.Lock()
	defer j.mu.Unlock()
	pace := float64(n) / max(took, time.Millisecond).Seconds()
	if h.pace > 0 {
		pace = (h.pace + pace) / 2
	}
	h.pace = pace
}

// learn notes whether a host honours ranges; false if it does not and one stream of it runs already.
func (j *job) learn(h *host, r ranges, sure bool) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !sure || h.ranges == r {
		return r != rangesNo || h.conns == 1
	}
	j.shared.learnRanges(h.name, r == rangesYes)
	first := r == rangesYes || h.ranges != rangesNo
	h.ranges = r
	j.wake()
	return first
}

// patience is how long a source may take until its first byte: short when there is another host to try and this one
// never brought anything.
func (j *job) patience(src *source) time.Duration {
	j.mu.Lock()
	defer j.mu.Unlock()
	if src.host.received > 0 {
		return j.opts.Stall
	}
	names := map[string]bool{src.host.name: true}
	for _, s := range j.sources {
		if j.usable(s) {
			names[s.host.name] = true
		}
	}
	if len(names) == 1 {
		return j.opts.Stall
	}
	short := j.opts.FirstContact / time.Duration(len(names))
	return min(j.opts.Stall, short<<min(src.host.fails, 8))
}

// reader reads a body and notes that something moves.
type reader struct {
	job      *job
	host     *host
	body     io.Reader
	timer    *time.Timer
	patience time.Duration
}

// fill reads until p is full or the body ends.
func (r *reader) fill(p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var m int
		m, err = r.body.Read(p[n:])
		if m > 0 {
			n += m
			r.timer.Reset(r.patience)
			r.job.arrive(r.host, int64(m))
		}
	}
	if n == len(p) {
		return n, nil
	}
	return n, err
}

// arrive counts bytes from the network.
func (j *job) arrive(h *host, n int64) {
	j.touch()
	j.received.Add(n)
	j.mu.Lock()
	defer j.mu.Unlock()
	h.received += n
	j.rate.add(n)
	if j.firstByte.IsZero() {
		j.firstByte = time.Now()
	}
	if j.phase == PhaseWaiting || j.phase == PhaseLock {
		j.phase = PhaseFetching
	}
}

// store writes the span up to end from a body that starts at the span's start.
func (j *job) store(in *reader, s *span, end int64, buf []byte) (got int64, err error) {
	for s.off < end {
		want := min(blockEnd(s.off), end) - s.off
		n, err := in.fill(buf[:want])
		if n > 0 {
			if err := j.landed(in.host, s, buf[:n]); err != nil {
				return got, err
			}
			got += int64(n)
		}
		if err != nil {
			return got, unexpected(err)
		}
	}
	return got, nil
}

// plain stores what is missing from a body that holds the whole blob, whoever may have fetched parts of it.
// The host's only request was for s, which goes back first.
func (j *job) plain(in *reader, s *span, buf []byte) (got int64, err error) {
	j.mu.Lock()
	j.ledger.release(s)
	j.mu.Unlock()
	for pos := int64(0); pos < j.blob.Size; pos = blockEnd(pos) {
		end := min(blockEnd(pos), j.blob.Size)
		n, readErr := in.fill(buf[:end-pos])
		m, err := j.fillIn(in.host, pos, buf[:n])
		got += m
		if err != nil {
			return got, err
		}
		if readErr != nil {
			return got, unexpected(readErr)
		}
	}
	return got, nil
}

// fillIn stores those bytes of p, which belong at off, that are missing and that nobody fetches.
func (j *job) fillIn(h *host, off int64, p []byte) (int64, error) {
	end := off + int64(len(p))
	j.mu.Lock()
	s := j.ledger.take(off, end)
	j.mu.Unlock()
	if s == nil {
		return 0, nil
	}
	defer func() {
		j.mu.Lock()
		defer j.mu.Unlock()
		j.ledger.release(s)
	}()
	n := s.end - s.off
	return n, j.landed(h, s, p[s.off-off:s.end-off])
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("the host ended the reply early: %w: %w", io.ErrUnexpectedEOF, errdefs.ErrUnavailable)
	}
	return err
}

// landed writes bytes that follow the start of a live span, all within one block, and records the block when it is full.
func (j *job) landed(h *host, s *span, p []byte) error {
	f := j.folder
	if _, err := f.data.WriteAt(p, s.off); err != nil {
		return &localError{err}
	}
	crc := crc32.Update(s.crc, castagnoli, p)
	start, end := s.off/blockSize*blockSize, s.off+int64(len(p))
	if end == min(start+blockSize, j.blob.Size) {
		if err := f.record(uint32(start/blockSize), end-start, crc); err != nil {
			return &localError{err}
		}
		crc = 0
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	h.fails = 0
	j.served.note(uint32(start/blockSize), h.name)
	j.ledger.landed(s, end, crc)
	j.advance()
	return nil
}

// advance moves the frontier. Called with mu held.
func (j *job) advance() {
	if f := j.ledger.frontier(); f != j.frontier || j.ledger.done() {
		j.frontier = f
		j.wake()
	}
}
