package harness

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
)

// Rule looks at a request before it is answered and says what is to go wrong; nil is nothing.
// It is called from many goroutines at once.
type Rule func(r *http.Request) *Fault

// Fault is what goes wrong with one request. Zero fields change nothing. A [Proxy] knows
// nothing of what lies inside a blob: WrongRange and Short206 are a [FaultRegistry]'s alone.
type Fault struct {
	Status         int           // answer this, without the blob
	RetryAfter     time.Duration // with Status: when to come back, in whole seconds
	Login          string        // ask for basic auth of "user:secret" and let in what has it
	Latency        time.Duration // wait before anything else
	IgnoreRange    bool          // the whole blob is sent, with status 200
	WrongRange     int64         // send, and say in Content-Range, what lies so many bytes further on than asked
	Short206       bool          // send the first half of what was asked, and say so in Content-Range
	BytesPerSecond int64         // send no faster
	CutAfter       int64         // close the connection after so many bytes of the body
	ResetAfter     int64         // the same with a RST, which also throws away what waits in the send buffer
	StallAfter     int64         // send nothing more after so many bytes of the body, until the client goes
	Until          <-chan struct{}
	// ^ with StallAfter: or this is closed, which closes the connection
	Corrupt func(p []byte, off int64)
	// ^ change bytes on their way; off is p's position in the blob
}

// Flip is for Fault.Corrupt: it inverts the byte of the blob at one offset.
func Flip(at int64) func(p []byte, off int64) {
	return func(p []byte, off int64) {
		if i := at - off; i >= 0 && i < int64(len(p)) {
			p[i] ^= 0xff
		}
	}
}

// Request is one request as it came by.
type Request struct {
	Method    string
	Host      string // that was asked, of several listeners
	Path      string
	Range     string // the request's header, "" for the whole
	UserAgent string
	Time      time.Time // when it came
	Login     bool      // an Authorization header came with it

	status atomic.Int64
	bytes  atomic.Int64
	ended  atomic.Pointer[time.Time]
}

func newRequest(r *http.Request) *Request {
	return &Request{
		Method: r.Method, Host: r.Host, Path: r.URL.Path, Range: r.Header.Get("Range"), UserAgent: r.UserAgent(),
		Time: time.Now(), Login: r.Header.Get("Authorization") != "",
	}
}

// Client returns the User-Agent up to its first slash.
func (r *Request) Client() string { return clientName(r.UserAgent) }

// Blob returns the digest of the blob that was asked for, if one was.
func (r *Request) Blob() (digest.Digest, bool) { return blobOf(r.Path) }

// Status returns the status of the reply, 0 before it.
func (r *Request) Status() int { return int(r.status.Load()) }

// Bytes returns how many bytes of the body were sent.
func (r *Request) Bytes() int64 { return r.bytes.Load() }

// Ended returns when the last byte was written or the connection broke; the zero time before.
func (r *Request) Ended() time.Time {
	if t := r.ended.Load(); t != nil {
		return *t
	}
	return time.Time{}
}

// exchange is a request under way: it travels in the request's context.
type exchange struct {
	record *Request
	fault  Fault
	pace   *bucket // of Fault.BytesPerSecond, nil if none
	sent   int64   // bytes of the body
}

type exchangeKey struct{}

// errCut says that the connection is to be broken.
var errCut = errors.New("cut by the rule")

// room returns how many of the next n bytes may be sent before the fault wants
// something to happen; when that is none, it happens, and the error says what.
func (x *exchange) room(ctx context.Context, n int64) (int64, error) {
	n = min(n, copyStep)
	if x.pace != nil {
		n = min(n, x.pace.step())
	}
	for _, at := range []int64{x.fault.CutAfter, x.fault.ResetAfter, x.fault.StallAfter} {
		if at > 0 {
			n = min(n, max(at-x.sent, 0))
		}
	}
	switch {
	case n > 0:
		return n, nil
	case x.fault.StallAfter > 0 && x.sent >= x.fault.StallAfter:
		select {
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		case <-x.fault.Until:
			return 0, errCut
		}
	case x.fault.ResetAfter > 0 && x.sent >= x.fault.ResetAfter:
		return 0, errors.Join(errCut, connOf(ctx).SetLinger(0))
	default:
		return 0, errCut
	}
}

// went notes n bytes of the body as sent, and waits as long as they take at the fault's pace.
func (x *exchange) went(ctx context.Context, n int64) error {
	x.sent += n
	x.record.bytes.Add(n)
	if x.pace == nil {
		return nil
	}
	return x.pace.wait(n, ctx.Done())
}

// refuse returns the status to answer instead of the blob, or 0.
func (f *Fault) refuse(w http.ResponseWriter, r *http.Request) int {
	if f.Login != "" {
		if !hasLogin(r, f.Login) {
			askLogin(w)
			return http.StatusUnauthorized
		}
		r.Header.Del("Authorization") // meant for us; a registry behind us has no login
	}
	if f.RetryAfter > 0 {
		w.Header().Set("Retry-After", strconv.FormatInt(int64(f.RetryAfter/time.Second), 10))
	}
	return f.Status
}

// pause waits for d or the end of ctx, whose cause it returns then.
func pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
