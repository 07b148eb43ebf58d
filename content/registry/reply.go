package registry

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/content/transfer"
)

// span is a part of a blob.
type span struct{ off, n int64 }

func (s span) String() string { return fmt.Sprintf("bytes %d-%d", s.off, s.off+s.n-1) }

// parseContentRange reads `bytes first-last/total` (RFC 9110, 14.4). total is
// -1 for `*`. Anything else, spaces and signs included, is an error.
func parseContentRange(value string) (got span, total int64, err error) {
	bad := func() (span, int64, error) {
		return span{}, 0, fmt.Errorf("content range %.100q is malformed: %w", value, transfer.ErrWrongRange)
	}
	rest, ok := strings.CutPrefix(value, "bytes ")
	if !ok {
		return bad()
	}
	window, size, ok := strings.Cut(rest, "/")
	first, last, ok2 := strings.Cut(window, "-")
	if !ok || !ok2 {
		return bad()
	}
	a, okA := parseDigits(first)
	b, okB := parseDigits(last)
	total, okT := parseDigits(size)
	if size == "*" {
		total, okT = -1, true
	}
	if !okA || !okB || !okT || b < a || total >= 0 && b >= total || b-a+1 < 1 {
		return bad()
	}
	return span{a, b - a + 1}, total, nil
}

// parseDigits takes digits only, where strconv would take signs.
func parseDigits(s string) (int64, bool) {
	if s == "" || len(s) > 19 || strings.Trim(s, "0123456789") != "" {
		return 0, false
	}
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil
}

// checkReply holds a successful reply against what was asked for and returns
// the part of the blob that its body is.
//
// A 206 may be shorter than asked for, as RFC 9110 allows, but starts where it
// was asked to; a 200 is the whole blob. Where the reply tells the blob's size
// or its own length, both must be right. Only a Content-Range is taken as the
// host's word on the size: a 200 of another length may be somebody's login page.
// One that comes without its length is known by its type: stored, it would be
// the start of the blob.
func checkReply(resp *http.Response, asked span, size int64) (span, error) {
	got := span{0, size}
	switch resp.StatusCode {
	case http.StatusOK:
	case http.StatusPartialContent:
		values := resp.Header.Values("Content-Range")
		if len(values) != 1 {
			return span{}, fmt.Errorf("206 with %d content ranges instead of one: %w", len(values), transfer.ErrWrongRange)
		}
		var total int64
		var err error
		if got, total, err = parseContentRange(values[0]); err != nil {
			return span{}, err
		}
		if total >= 0 && total != size {
			return span{}, fmt.Errorf("blob of %d bytes instead of %d: %w", total, size, transfer.ErrWrongSize)
		}
		if got.off != asked.off || got.n > asked.n {
			return span{}, fmt.Errorf("%s instead of %s: %w", got, asked, transfer.ErrWrongRange)
		}
	default:
		return span{}, fmt.Errorf("unexpected %s: %w", clean(resp.Status), errdefs.ErrFailedPrecondition)
	}
	if resp.StatusCode == http.StatusOK && resp.ContentLength < 0 && isPage(resp) {
		return span{}, fmt.Errorf("a web page instead of the blob: %w", errdefs.ErrFailedPrecondition)
	}
	if resp.ContentLength >= 0 && resp.ContentLength != got.n {
		return span{}, fmt.Errorf("reply of %d bytes instead of %d: %w", resp.ContentLength, got.n, errdefs.ErrFailedPrecondition)
	}
	if enc := resp.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return span{}, fmt.Errorf("reply encoded as %.50q, which was not asked for: %w", enc, errdefs.ErrFailedPrecondition)
	}
	return got, nil
}

// isPage says whether a reply is for a person to read. A blob that is a page comes with its length.
func isPage(resp *http.Response) bool {
	kind, _, _ := strings.Cut(resp.Header.Get("Content-Type"), ";")
	return strings.EqualFold(strings.TrimSpace(kind), "text/html")
}
