package registry

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/textproto"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unicode"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/content/transfer"
)

// MaxRetryAfter bounds what a host may ask for with Retry-After: that is how
// long containerd's clients wait without progress, at most.
const MaxRetryAfter = 2 * time.Minute

// retryError is an error of a host that said when to come back.
type retryError struct {
	error
	after time.Duration
}

// RetryAfter is how long the host wants to be left alone, above zero and at
// most MaxRetryAfter. Callers find it with errors.As.
func (e *retryError) RetryAfter() time.Duration { return e.after }

func (e *retryError) Unwrap() error { return e.error }

// parseRetryAfter reads the header in both forms of RFC 9110, 10.2.3. Zero:
// absent, in the past, or nonsense.
func parseRetryAfter(value string, now time.Time) time.Duration {
	value = strings.TrimSpace(value)
	if value == "" || len(value) > 64 {
		return 0
	}
	if strings.Trim(value, "0123456789") == "" {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > int64(MaxRetryAfter/time.Second) {
			return MaxRetryAfter // too many digits are too many seconds
		}
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return min(max(at.Sub(now), 0), MaxRetryAfter)
}

// kindOfStatus names the sentinel of a status that is no success.
func kindOfStatus(code int) error {
	switch code {
	case http.StatusNotFound, http.StatusGone:
		return errdefs.ErrNotFound
	case http.StatusUnauthorized, http.StatusProxyAuthRequired:
		return errdefs.ErrUnauthenticated
	case http.StatusForbidden, http.StatusUnavailableForLegalReasons:
		return errdefs.ErrPermissionDenied
	case http.StatusRequestedRangeNotSatisfiable:
		return transfer.ErrWrongRange // only what lies within the blob is asked for
	case http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return errdefs.ErrUnavailable
	}
	if code >= 500 {
		return errdefs.ErrUnavailable
	}
	return errdefs.ErrFailedPrecondition
}

// statusError describes a reply that is no success. It reads what the host has
// to say; the caller closes the body.
func statusError(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10)) // what came counts
	err := fmt.Errorf("%s%s: %w", clean(resp.Status), detail(body), kindOfStatus(resp.StatusCode))
	if !errdefs.IsUnavailable(err) {
		return err
	}
	if after := parseRetryAfter(resp.Header.Get("Retry-After"), time.Now()); after > 0 {
		return &retryError{err, after}
	}
	return err
}

// detail takes the first message out of a registry's JSON error.
func detail(body []byte) string {
	var reply struct {
		Errors []struct{ Code, Message string }
	}
	if json.Unmarshal(body, &reply) != nil || len(reply.Errors) == 0 {
		return ""
	}
	e := reply.Errors[0]
	return fmt.Sprintf(" (%s: %s)", clean(e.Code), clean(e.Message))
}

// clean makes a string of a host fit for a log line and a pod's events.
func clean(s string) string {
	const most = 200
	s = strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)
	if len(s) > most {
		s = strings.ToValidUTF8(s[:most], "") + "..."
	}
	return s
}

// kindOfTransport classifies an error of a request that got no reply; nil if
// it is none. What no retry can cure is ErrFailedPrecondition: a certificate
// nobody vouches for, a port that speaks no TLS, a
// header that is none, a refusal of the guard.
func kindOfTransport(err error) error {
	var cert *tls.CertificateVerificationError
	var record tls.RecordHeaderError
	var protocol textproto.ProtocolError
	switch {
	case errors.As(err, &cert), errors.As(err, &record), errors.As(err, &protocol), errors.Is(err, http.ErrSchemeMismatch),
		errors.Is(err, errPlain), errors.Is(err, errElsewhere):
		return errdefs.ErrFailedPrecondition
	}
	var network net.Error
	var u *url.Error
	var errno syscall.Errno
	if errors.As(err, &network) || errors.As(err, &u) || errors.As(err, &errno) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errdefs.ErrUnavailable
	}
	return nil
}

// withoutURL drops the URL from an error of http.Client: it may hold the
// signature of a redirect.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}

// transportError describes a request that got no reply.
func transportError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = withoutURL(err)
	kind := kindOfTransport(err)
	if kind == nil {
		kind = errdefs.ErrUnavailable
	}
	return fmt.Errorf("%w: %w", kind, quiet{err})
}

// quiet is an error whose text may quote a host. It has no Unwrap: containerd's
// errgrpc would go on to a net.DNSError, whose Unwrap returns nil, and panic.
type quiet struct{ error }

func (q quiet) Error() string        { return clean(q.error.Error()) }
func (q quiet) Is(target error) bool { return errors.Is(q.error, target) }
func (q quiet) As(target any) bool   { return errors.As(q.error, target) }
