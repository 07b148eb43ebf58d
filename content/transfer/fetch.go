package transfer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// errNoSource: nobody is left to ask.
var errNoSource = errors.New("no host serves the blob")

// errAllThere ends waiting for a connection and reading what nobody needs.
var errAllThere = errors.New("nothing is missing any more")

// Why a connection is ended before its time.
var (
	errStalled   = fmt.Errorf("connection brought nothing for too long: %w", errdefs.ErrUnavailable)
	errTrickles  = fmt.Errorf("connection brought next to nothing for too long: %w", errdefs.ErrUnavailable)
	errOvertaken = fmt.Errorf("connection stood still while others were fast: %w", errdefs.ErrUnavailable)
)

// isOurs says whether it was this side that lost patience.
func isOurs(err error) bool {
	return errors.Is(err, errStalled) || errors.Is(err, errTrickles) || errors.Is(err, errOvertaken)
}

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
	g.Go(func() error { return unlessAllThere(j.dispatch(wctx, g)) })
	err := g.Wait()
	stop(err)
	<-watched
	return err
}

func unlessAllThere(err error) error {
	if errors.Is(err, errAllThere) {
		return nil
	}
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

// bufferSize is what a connection takes from the network and writes in one step, if there is as much. One write of 256
// KiB costs a quarter less than four of 64 KiB. More would cost a kill more, and the kernel more where its memory is in
// pieces: a write of 2 MiB can take several times as long a byte.
const bufferSize = blockSize

// buffers hold what each connection under way receives.
var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// exchange sends one request and stores the reply. got counts bytes that were missing before.
func (j *job) exchange(ctx context.Context, c *conn) (got int64, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	j.mu.Lock()
	c.cancel = cancel
	off, n := c.span.off, c.span.end-c.span.off
	if c.plain {
		off, n = 0, j.blob.Size
	}
	_, live := j.ledger.live[c.span]
	j.mu.Unlock()
	if !live {
		return 0, nil // one plain stream brings it
	}
	timer := time.AfterFunc(j.patience(c.src), func() { cancel(errStalled) })
	defer timer.Stop()
	defer func() {
		for _, why := range []error{errStalled, errTrickles, errOvertaken} {
			if err != nil && errors.Is(context.Cause(ctx), why) {
				err = fmt.Errorf("%w, %d bytes in %s", why, got, time.Since(c.begun).Round(time.Millisecond))
			}
		}
	}()
	body, err := c.src.Open(ctx, off, n)
	if err != nil {
		return 0, err
	}
	defer func() { _ = body.Close() }()
	j.shared.hosts.answered(c.src.host.shared, time.Since(c.begun))
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	in := &reader{job: j, conn: c, body: body, timer: timer, patience: j.opts.Stall, buf: buf[:]}
	switch {
	case !c.plain && body.Off == off && body.N > 0 && body.N <= n:
		j.learn(c.src.host, rangesYes, n < j.blob.Size)
		return j.store(in, off+body.N)
	case body.Off == 0 && (body.N < 0 || body.N == j.blob.Size):
		if !j.learn(c.src.host, rangesNo, n < j.blob.Size) {
			return 0, nil // another stream of this host is on its way
		}
		return j.plain(in, c.span)
	}
	return 0, fmt.Errorf("asked for %d bytes from %d, the reply says %d from %d: %w", n, off, body.N, body.Off, ErrWrongRange)
}

// learn notes whether a host honours ranges; false if it does not and one stream of it runs already.
func (j *job) learn(h *host, r ranges, sure bool) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !sure || h.ranges == r {
		return r != rangesNo || h.conns == 1
	}
	if h.ranges == rangesNo {
		return true // asked before that was known; nobody asks it for ranges again
	}
	j.shared.hosts.learnRanges(h.shared, r == rangesYes)
	h.ranges = r
	if r == rangesNo {
		for c := range j.conns { // the stream brings what they asked for, too
			if c.src.host == h && c.got == 0 {
				j.ledger.release(c.span)
			}
		}
	}
	j.wake()
	return true
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
	short := j.opts.FirstContact / time.Duration(max(len(names), 3))
	return min(j.opts.Stall, short<<min(src.host.fails, 8))
}

// reader reads a body and notes that something moves.
type reader struct {
	job      *job
	conn     *conn
	body     io.Reader
	timer    *time.Timer
	patience time.Duration
	buf      []byte
	n        int // bytes in buf
}

// fill reads until buf holds least bytes or the body ends, and takes along what is there already, most bytes in all.
func (r *reader) fill(least, most int64) (err error) {
	most = min(most, int64(len(r.buf)))
	for int64(r.n) < min(least, most) && err == nil {
		var m int
		m, err = r.body.Read(r.buf[r.n:most])
		if m > 0 {
			r.n += m
			r.timer.Reset(r.patience)
			r.job.arrive(r.conn, int64(m))
		}
	}
	if int64(r.n) >= min(least, most) {
		return nil
	}
	return err
}

// used takes the first n bytes out of buf.
func (r *reader) used(n int64) { r.n = copy(r.buf, r.buf[n:r.n]) }

// arrive counts bytes from the network.
func (j *job) arrive(c *conn, n int64) {
	h := c.src.host
	j.touch()
	j.received.Add(n)
	j.shared.hosts.arrived(h.shared, n)
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
	j.clock(c, n)
}

// store writes the span of a connection, up to end and for as long as nobody else takes its tail over, from a body that
// starts where the span does. What is there of a block is recorded at every step, because a kill costs what is not.
// A connection waits for no more than the end of a step: what is written at once is what had come meanwhile.
func (j *job) store(in *reader, end int64) (got int64, err error) {
	s := in.conn.span
	for {
		left := min(end, j.ends(s)) - s.off
		if left <= 0 {
			return got, nil
		}
		err := in.fill(stepEnd(s.off)-s.off, left)
		n := int64(in.n)
		if steps := (s.off+n)/recordStep*recordStep - s.off; err == nil && n < left && steps > 0 {
			n = steps
		}
		// A span of which nothing has come may have been given to a plain stream while this waited for its first bytes.
		// What that one stored may be hashed by now. Once something came, the span is this connection's until it ends.
		if n = j.reserve(s, n); n > 0 {
			if err := j.landed(in.conn.src.host, s, in.buf[:n]); err != nil {
				return got, err
			}
			got += n
			in.used(n)
		}
		if err != nil {
			return got, unexpected(err)
		}
	}
}

// ends is where a span ends that its connection still has; 0 if one plain stream brings it.
func (j *job) ends(s *span) int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, live := j.ledger.live[s]; !live {
		return 0
	}
	return s.end
}

// reserve says how many of the next n bytes of a span its connection may write. Nobody takes them over meanwhile.
func (j *job) reserve(s *span, n int64) int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	if _, live := j.ledger.live[s]; !live {
		return 0
	}
	n = min(n, s.end-s.off)
	s.held = s.off + n
	return n
}

// recordStep is what a kill may cost of each connection, beside what the kernel holds of it and what is being written:
// that is more than a step only if more had come than was written, so the kernel would hold it else. Blocks are whole
// multiples.
const recordStep = 64 << 10

func stepEnd(off int64) int64 { return off/recordStep*recordStep + recordStep }

// plain stores what is missing from a body that holds the whole blob, whoever may have fetched parts of it.
// The host's only request was for s, which goes back first.
func (j *job) plain(in *reader, s *span) (got int64, err error) {
	j.mu.Lock()
	j.ledger.release(s)
	missing := len(j.ledger.gaps) > 0
	j.mu.Unlock()
	if !missing {
		return 0, nil // an earlier stream brought it
	}
	for pos := int64(0); pos < j.blob.Size; pos = blockEnd(pos) {
		end := min(blockEnd(pos), j.blob.Size)
		readErr := in.fill(end-pos, end-pos)
		m, err := j.fillIn(in.conn.src.host, pos, in.buf[:in.n])
		in.n = 0
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

// landed writes bytes that follow the start of a live span, and records the blocks that are full, and how far the last
// one is.
func (j *job) landed(h *host, s *span, p []byte) error {
	f := j.folder
	if err := j.write(p, s.off); err != nil {
		return &localError{err}
	}
	off, end, crc := s.off, s.off+int64(len(p)), s.crc
	var recs [bufferSize/blockSize + 1]record
	n := 0
	for off < end {
		upTo := min(blockEnd(off), end)
		crc = crc32.Update(crc, castagnoli, p[:upTo-off])
		p = p[upTo-off:]
		start := off / blockSize * blockSize
		if upTo%recordStep == 0 || upTo == j.blob.Size {
			recs[n] = record{block: uint32(start / blockSize), length: uint32(upTo - start), crc: crc}
			n++
		}
		if upTo == min(start+blockSize, j.blob.Size) {
			crc = 0
		}
		off = upTo
	}
	if err := f.state.append(kindBlock, recs[:n]...); err != nil {
		return &localError{err}
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	h.fails = 0
	for block := s.off / blockSize; block*blockSize < end; block++ {
		j.served.note(uint32(block), h.name)
	}
	j.ledger.landed(s, end, crc)
	j.advance()
	return nil
}

// write has old transfers make room for p where the disk is full.
func (j *job) write(p []byte, off int64) error {
	for {
		rooms := j.shared.rooms.Load()
		if _, err := j.folder.data.WriteAt(p, off); !full(err) || !j.shared.makeRoom(rooms) {
			return err
		}
	}
}

// advance moves the frontier. Called with mu held.
func (j *job) advance() {
	if f := j.ledger.frontier(); f != j.frontier || j.ledger.done() {
		j.frontier = f
		j.wake()
	}
}
