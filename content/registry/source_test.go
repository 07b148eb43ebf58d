package registry

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

var discardLog = log.New(io.Discard, "", 0)

func TestRanges(t *testing.T) {
	t.Parallel()
	h := start(t, func(w http.ResponseWriter, r *http.Request) { serve(w, r) })
	s := only(t, newRegistry(t, Options{UserAgent: "gantry/test"}), h.addr())
	size := int64(len(blob))
	for _, r := range []span{{0, 1}, {0, size}, {1000, 5000}, {size - 1, 1}} {
		mustFetch(t, s, r.off, r.n)
	}
	for i, req := range h.requests() {
		if req.URL.Path != blobPath+blobDigest.String() || req.URL.RawQuery != "" || req.UserAgent() != "gantry/test" || req.Header.Get("Accept-Encoding") != "identity" {
			t.Errorf("request %d: %s %v", i, req.URL, req.Header)
		}
	}
	if got := h.requests()[2].Header.Get("Range"); got != "bytes=1000-5999" {
		t.Errorf("range %q", got)
	}
	for _, r := range []span{{-1, 1}, {0, 0}, {0, -1}, {0, size + 1}, {size, 1}, {1, 1<<63 - 1}, {1<<63 - 1, 1}} {
		if _, err := s.Open(t.Context(), r.off, r.n); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", r, err)
		}
	}
}

func TestEmptyBlob(t *testing.T) {
	t.Parallel()
	s, err := newRegistry(t, Options{}).Sources(t.Context(), "registry.invalid", repo, blobDigest, 0)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := fetch(t.Context(), s[0], 0, 0); len(got) != 0 || err != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

// TestConnectionsAreKept counts what parallel ranges cost in connections.
func TestConnectionsAreKept(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	conns := map[string]bool{}
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		conns[r.RemoteAddr] = true
		mu.Unlock()
		serve(w, r)
	})
	s := only(t, newRegistry(t, Options{}), h.addr())
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			for j := range int64(10) {
				if got, err := fetch(t.Context(), s, i*20_000+j*1000, 1000); err != nil || !bytes.Equal(got, blob[i*20_000+j*1000:][:1000]) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
		})
	}
	wg.Wait()
	if len(conns) > 12 { // 8 at a time; a few spare for dials that lost a race
		t.Errorf("%d connections for 8 parallel ranges", len(conns))
	}
}

// TestReplies has one reply a case, to a request for 1000 bytes from 5000.
func TestReplies(t *testing.T) {
	t.Parallel()
	part := blob[5000:6000]
	reply := func(code int, body []byte, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i < len(header); i += 2 {
				w.Header().Add(header[i], header[i+1])
			}
			w.WriteHeader(code)
			_, _ = w.Write(body)
		}
	}
	good := fmt.Sprintf("bytes 5000-5999/%d", len(blob))
	chunked := func(code int, body []byte, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			reply(code, nil, header...)(w, r)
			w.(http.Flusher).Flush()
			_, _ = w.Write(body)
		}
	}
	ok := func(error) bool { return true }
	for _, c := range []struct {
		name string
		h    http.HandlerFunc
		want []byte
		off  int64
		is   func(error) bool // nil: no error
	}{
		{name: "exact", h: reply(206, part, "Content-Range", good), want: part, off: 5000},
		{name: "exact, chunked", h: chunked(206, part, "Content-Range", good), want: part, off: 5000},
		{name: "total unknown", h: reply(206, part, "Content-Range", "bytes 5000-5999/*"), want: part, off: 5000},
		{name: "200 instead of 206", h: reply(200, blob, "Content-Length", fmt.Sprint(len(blob))), want: blob},
		{name: "200, chunked", h: chunked(200, blob), want: blob},
		{name: "shorter range, said so", h: reply(206, part[:10], "Content-Range", fmt.Sprintf("bytes 5000-5009/%d", len(blob))), want: part[:10], off: 5000},
		{name: "200 of another size", h: reply(200, blob[1:], "Content-Length", fmt.Sprint(len(blob)-1)), is: errdefs.IsFailedPrecondition},
		{name: "200, chunked, too long", h: chunked(200, append(bytes.Clone(blob), 1)), is: errdefs.IsFailedPrecondition},
		{name: "200, chunked, too short", h: chunked(200, blob[1:]), is: errdefs.IsUnavailable},
		{name: "200, a page", h: chunked(200, []byte("<html>log in"), "Content-Type", "text/html; charset=utf-8"), is: errdefs.IsFailedPrecondition},
		{name: "200, a blob that is a page", h: reply(200, blob, "Content-Type", "text/html", "Content-Length", fmt.Sprint(len(blob))), want: blob},
		{name: "no content range", h: reply(206, part), is: errdefs.IsFailedPrecondition},
		{name: "two content ranges", h: reply(206, part, "Content-Range", good, "Content-Range", good), is: errdefs.IsFailedPrecondition},
		{name: "another offset", h: reply(206, part, "Content-Range", fmt.Sprintf("bytes 5001-6000/%d", len(blob))), is: errdefs.IsFailedPrecondition},
		{name: "longer range", h: reply(206, blob[5000:6001], "Content-Range", fmt.Sprintf("bytes 5000-6000/%d", len(blob))), is: errdefs.IsFailedPrecondition},
		{name: "another total", h: reply(206, part, "Content-Range", fmt.Sprintf("bytes 5000-5999/%d", len(blob)+1)), is: errdefs.IsFailedPrecondition},
		{name: "length against range", h: reply(206, part[:999], "Content-Range", good), is: errdefs.IsFailedPrecondition},
		{name: "chunked, too short", h: chunked(206, part[:999], "Content-Range", good), is: errdefs.IsUnavailable},
		{name: "chunked, too long", h: chunked(206, blob[5000:6001], "Content-Range", good), is: errdefs.IsFailedPrecondition},
		{name: "announced, then cut", h: reply(206, part[:500], "Content-Range", good, "Content-Length", "1000"), is: errdefs.IsUnavailable},
		{name: "multipart", h: reply(206, part, "Content-Type", "multipart/byteranges; boundary=x"), is: errdefs.IsFailedPrecondition},
		{name: "malformed range", h: reply(206, part, "Content-Range", "bytes 5000-5999"), is: errdefs.IsFailedPrecondition},
		{name: "hostile range", h: reply(206, part, "Content-Range", strings.Repeat("\x7f\u202e9", 2000)), is: errdefs.IsFailedPrecondition},
		{name: "encoded", h: reply(206, part, "Content-Range", good, "Content-Encoding", "gzip"), is: errdefs.IsFailedPrecondition},
		{name: "204", h: reply(204, nil), is: errdefs.IsFailedPrecondition},
		{name: "304", h: reply(304, nil), is: errdefs.IsFailedPrecondition},
		{name: "400", h: reply(400, nil), is: errdefs.IsFailedPrecondition},
		{name: "401 without a challenge", h: reply(401, nil), is: errdefs.IsUnauthorized},
		{name: "403", h: reply(403, nil), is: errdefs.IsPermissionDenied},
		{name: "404", h: reply(404, nil), is: errdefs.IsNotFound},
		{name: "410", h: reply(410, nil), is: errdefs.IsNotFound},
		{name: "416", h: reply(416, nil, "Content-Range", "bytes */10"), is: errdefs.IsFailedPrecondition},
		{name: "429", h: reply(429, nil), is: errdefs.IsUnavailable},
		{name: "500", h: reply(500, nil), is: errdefs.IsUnavailable},
		{name: "503", h: reply(503, nil), is: errdefs.IsUnavailable},
		{name: "redirect to nowhere", h: reply(307, nil), is: errdefs.IsFailedPrecondition},
		{name: "redirect to a file", h: reply(307, nil, "Location", "file:///etc/passwd"), is: errdefs.IsFailedPrecondition},
		{name: "redirect, malformed", h: reply(307, nil, "Location", "http://[::1"), is: errdefs.IsFailedPrecondition},
		{name: "redirect for ever", h: reply(307, nil, "Location", "?again"), is: errdefs.IsFailedPrecondition},
		{name: "huge header", h: reply(206, part, "X-Long", strings.Repeat("x", 1<<20)), is: ok},
		{name: "connection closed", h: func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, is: errdefs.IsUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			h := start(t, c.h)
			s := only(t, newRegistry(t, Options{}), h.addr())
			b, err := s.Open(t.Context(), 5000, 1000)
			var got []byte
			if err == nil {
				got, err = io.ReadAll(b)
				_ = b.Close()
			}
			if c.is == nil {
				if err != nil || !bytes.Equal(got, c.want) || b.Off != c.off || b.N != int64(len(c.want)) {
					t.Fatalf("%d bytes from %d, N %d, error %v", len(got), b.Off, b.N, err)
				}
				return
			}
			if !c.is(err) {
				t.Fatalf("error %v", err)
			}
			if text := err.Error(); strings.Contains(text, blobDigest.String()) || strings.Contains(text, h.addr()) {
				t.Errorf("the transfer names blob and host, and then the error does again: %s", text)
			}
			if len(err.Error()) > 700 || strings.ContainsAny(err.Error(), "\x7f\u202e\n") {
				t.Errorf("error unfit for a log: %q", err)
			}
		})
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		code     int
		value    string
		from, to time.Duration
	}{
		{429, "7", 7 * time.Second, 7 * time.Second},
		{503, "7", 7 * time.Second, 7 * time.Second},
		{503, time.Now().Add(time.Minute).UTC().Format(http.TimeFormat), 50 * time.Second, time.Minute},
		{429, "99999999999999999999999", MaxRetryAfter, MaxRetryAfter},
		{429, "86400", MaxRetryAfter, MaxRetryAfter},
		{429, "Fri, 31 Dec 2100 23:59:59 GMT", MaxRetryAfter, MaxRetryAfter},
		{429, "Fri, 31 Dec 1999 23:59:59 GMT", 0, 0},
		{429, "0", 0, 0},
		{429, "-5", 0, 0},
		{429, "soon", 0, 0},
		{429, "", 0, 0},
		{403, "7", 0, 0},
	} {
		t.Run(fmt.Sprint(c.code, " ", c.value), func(t *testing.T) {
			t.Parallel()
			h := start(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Retry-After", c.value)
				w.WriteHeader(c.code)
				_, _ = io.WriteString(w, `{"errors":[{"code":"TOOMANYREQUESTS","message":"pull\nlimit"}]}`)
			})
			_, err := only(t, newRegistry(t, Options{}), h.addr()).Open(t.Context(), 0, 10)
			contains(t, err, "TOOMANYREQUESTS: pull limit")
			var r interface{ RetryAfter() time.Duration }
			var after time.Duration
			if errors.As(err, &r) {
				after = r.RetryAfter()
			}
			if after < c.from || after > c.to {
				t.Errorf("after %s, want %s to %s", after, c.from, c.to)
			}
		})
	}
}

func TestStalls(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]http.HandlerFunc{
		"before the header": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"in the body": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Range", fmt.Sprintf("bytes 0-999/%d", len(blob)))
			w.Header().Set("Content-Length", "1000")
			w.WriteHeader(206)
			_, _ = w.Write(blob[:300])
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
		"in an error's body": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(500)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := only(t, newRegistry(t, Options{StallTimeout: 200 * time.Millisecond}), start(t, h).addr())
			if _, err := fetch(t.Context(), s, 0, 1000); !errdefs.IsUnavailable(err) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestSlowReaderIsNoStall(t *testing.T) {
	t.Parallel()
	h := start(t, serve)
	s := only(t, newRegistry(t, Options{StallTimeout: 500 * time.Millisecond}), h.addr())
	b, err := s.Open(t.Context(), 0, 100_000)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = b.Close() }()
	time.Sleep(700 * time.Millisecond)
	if got, err := io.ReadAll(b); err != nil || !bytes.Equal(got, blob[:100_000]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}

func TestContextAndCloseEndARead(t *testing.T) {
	t.Parallel()
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(blob)))
		_, _ = w.Write(blob[:10])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	s := only(t, newRegistry(t, Options{}), h.addr())
	told := errors.New("told to stop")
	ctx, cancel := context.WithCancelCause(t.Context())
	b, err := s.Open(ctx, 0, 100)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { cancel(told) })
	if _, err := io.ReadAll(b); !errors.Is(err, told) || errdefs.IsUnavailable(err) {
		t.Errorf("cancelled: %v", err)
	}
	_ = b.Close()
	if _, err := s.Open(ctx, 0, 100); !errors.Is(err, told) {
		t.Errorf("Open with an ended context: %v", err)
	}
	if b, err = s.Open(t.Context(), 0, 100); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, func() { _ = b.Close() })
	if _, err := io.ReadAll(b); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("closed: %v", err)
	}
}

func TestUnreachableFailsWithinSeconds(t *testing.T) {
	t.Parallel()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := l.Addr().String()
	_ = l.Close()
	// Accepts (the kernel does) and never says a word of TLS.
	mute, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mute.Close() })
	for name, addr := range map[string]string{"refused": refused, "mute": mute.Addr().String()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRegistry(t, Options{DialTimeout: 300 * time.Millisecond, ConfigPath: certs(t, addr, fmt.Sprintf("server = %q", "https://"+addr))})
			if _, err := only(t, r, addr).Open(t.Context(), 0, 10); !errdefs.IsUnavailable(err) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func FuzzContentRange(f *testing.F) {
	for _, s := range []string{"bytes 0-0/1", "bytes 5-9/*", "bytes */10", "bytes 9-5/10", "bytes -1-5/10", "bytes 0-9223372036854775807/9223372036854775807", "bytes 0-9223372036854775807/*", "bytes 0-0/0", "items 0-1/2", "bytes 0-1/2/3", "bytes +0-1/2", "bytes 0x0-1/2", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, in string) {
		got, total, err := parseContentRange(in)
		if err != nil {
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatal(err)
			}
			return
		}
		if got.off < 0 || got.n < 1 || got.off+(got.n-1) < got.off || total < -1 || total >= 0 && got.off+got.n > total {
			t.Fatalf("%q: %+v of %d", in, got, total)
		}
		if total >= 0 {
			again, _, err := parseContentRange(fmt.Sprintf("%s/%d", got, total))
			if err != nil || again != got {
				t.Fatalf("%q: %v, %v", in, again, err)
			}
		}
	})
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"1", "120", "-1", "1e9", "99999999999999999999", "Fri, 31 Dec 1999 23:59:59 GMT", "Friday, 31-Dec-99 23:59:59 GMT", "Fri Dec 31 23:59:59 1999", " 5 ", ""} {
		f.Add(s)
	}
	now := time.Date(1999, 12, 31, 23, 59, 0, 0, time.UTC)
	f.Fuzz(func(t *testing.T, in string) {
		if d := parseRetryAfter(in, now); d < 0 || d > MaxRetryAfter {
			t.Fatalf("%q: %s", in, d)
		}
	})
}
