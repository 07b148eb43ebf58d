package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

// Source is one place that serves the bytes of a blob.
type Source interface {
	// Host names the place in logs and errors, and is what connections are counted by.
	Host() string
	// Open asks for n bytes from off, n > 0, in one request. ctx bounds the reading of the body too, which must end
	// soon after it. Called by several goroutines at once.
	//
	// Final for this source: errdefs.ErrNotFound, ErrUnauthenticated, ErrPermissionDenied, and ErrFailedPrecondition
	// when the reply contradicts the request. After ErrWrongRange the source is only asked for the whole blob, off 0, by
	// one connection, in which it should not speak of ranges at all. Everything else is tried again, no sooner than the
	// error's RetryAfter() time.Duration if it has that method. An error names neither blob nor host: the transfer does.
	Open(ctx context.Context, off, n int64) (Body, error)
	// Tier orders the sources: those of the lowest tier that has one left share the chunks, and the next tier is asked
	// when none is left there or all of them have been failing for some seconds.
	Tier() int
}

// Body is a reply. Off and N say what the host really sends: a host that ignores ranges answers 0 and the blob's size.
// N may be smaller than what was asked for; the rest is asked for again. A negative N with Off 0 means the whole blob
// without a stated length.
type Body struct {
	io.ReadCloser
	Off, N int64
}

// ErrWrongSize is what a Source answers that has the blob, but not with the size asked for. It is an
// errdefs.ErrFailedPrecondition. The source is asked once more, because one such reply among good ones is the host's
// mistake. When all sources that answer say so, the transfer's error is one too: whoever stated the size was wrong.
var ErrWrongSize = fmt.Errorf("the size is not the one asked for: %w", errdefs.ErrFailedPrecondition)

// ErrWrongRange is what a Source answers whose host sends another part than was asked for, or does not say which. It is
// an errdefs.ErrFailedPrecondition. No byte of such a reply is stored.
var ErrWrongRange = fmt.Errorf("the reply is not the range asked for: %w", errdefs.ErrFailedPrecondition)

// A source is dropped for good on these.
var finalErrors = []error{
	errdefs.ErrNotFound, errdefs.ErrUnauthenticated, errdefs.ErrPermissionDenied, errdefs.ErrFailedPrecondition,
}

func isFinal(err error) bool {
	for _, f := range finalErrors {
		if errors.Is(err, f) {
			return true
		}
	}
	return false
}

const (
	backoffMin = 100 * time.Millisecond
	backoffMax = 5 * time.Second
	// A connection that brought this much before it broke is replaced at once.
	goodProgress = 64 << 10
	// A host that ignores ranges sends everything from the start each time: so often without a new byte, then never again.
	plainTries = 4
	// Nothing listens at a host that never brought anything: so often, then it is not there. Whoever waits can fall back.
	absentTries = 3
	// More sources than this of one host bring nothing new.
	sourcesPerHost = 3
)

type ranges int

const (
	rangesUnknown ranges = iota // one connection at a time until the first reply
	rangesYes
	rangesNo // one plain stream at a time
)

// host is what a transfer knows of a host. Guarded by job.mu.
type host struct {
	name     string
	shared   *hostState
	ranges   ranges
	conns    int   // under way
	attempts int   // requests made
	fails    int   // in a row, without progress
	misfits  int   // replies with another size of the blob
	received int64 // bytes, all generations
}

type source struct {
	Source
	host *host
	gone error // why it is not asked any more
}

// backoff is how long to wait after the nth failure in a row, n ≥ 1, with jitter.
func backoff(n int) time.Duration {
	d := backoffMax
	if n < 10 {
		d = min(backoffMax, backoffMin<<(n-1))
	}
	return d/2 + rand.N(d/2+1)
}

func retryAfter(err error) time.Duration {
	var r interface{ RetryAfter() time.Duration }
	if errors.As(err, &r) {
		return r.RetryAfter()
	}
	return 0
}

func isWrongSize(err error) bool { return errors.Is(err, ErrWrongSize) }

// isAbsent says whether nobody is there to answer, as opposed to somebody who is busy.
func isAbsent(err error) bool {
	var dns *net.DNSError
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) ||
		errors.As(err, &dns) && dns.IsNotFound
}

// failed books the end of a connection that brought got bytes. plain: it asked for the whole blob because the host does
// not do ranges. Called with job.mu held.
func (s *source) failed(got int64, plain bool, err error) error {
	h := s.host
	err = fmt.Errorf("host %s, attempt %d: %w", h.name, h.attempts, err)
	if isWrongSize(err) {
		if h.misfits++; h.misfits == 1 {
			return err
		}
		if h.received > 0 { // it knew better before
			err = fmt.Errorf("%s, which it did not say before: %w", err.Error(), ErrWrongRange)
		}
	}
	if errors.Is(err, ErrWrongRange) && !plain {
		h.ranges = rangesNo
		return err
	}
	if isFinal(err) {
		s.gone = err
		return err
	}
	if h.fails++; got > 0 {
		h.fails = 0
	}
	if h.ranges == rangesNo && h.fails >= plainTries || h.received == 0 && h.fails >= absentTries && isAbsent(err) {
		s.gone = err
	}
	return err
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// meter is a rate over the last seconds. Guarded by job.mu.
type meter struct {
	start time.Time
	bytes int64
	rate  float64 // bytes a second
}

const meterWindow = time.Second

func (m *meter) add(n int64) {
	now := time.Now()
	if m.start.IsZero() {
		m.start = now
	}
	m.bytes += n
	if d := now.Sub(m.start); d >= meterWindow {
		m.rate = float64(m.bytes) / d.Seconds()
		m.start, m.bytes = now, 0
	}
}

func (m *meter) value() float64 {
	if m.start.IsZero() {
		return 0
	}
	d := time.Since(m.start)
	if m.rate > 0 && d < 2*meterWindow {
		return m.rate
	}
	return float64(m.bytes) / max(d, meterWindow/4).Seconds()
}
