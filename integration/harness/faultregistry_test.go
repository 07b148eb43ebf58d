package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// served is a registry with one image, and the bytes of its only layer.
func served(t *testing.T, o FaultOptions) (f *FaultRegistry, im *Image, layer []byte) {
	t.Helper()
	im, err := Build(t.Context(), filepath.Join(t.TempDir(), "image"), ImageSpec{
		Layers: []LayerSpec{{Tar: Noise("n", 1, 1<<20, 1), Compression: Uncompressed}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if layer, err = os.ReadFile(im.path(im.Layers[0].Digest)); err != nil {
		t.Fatal(err)
	}
	if f, err = StartFaultRegistry(t.Context(), o); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closed(t, f) })
	f.AddImage(im, "some/image", "v1")
	return f, im, layer
}

func closed(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// client follows no redirects and keeps no connection.
func client() *http.Client {
	return &http.Client{
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// got is a reply as far as it came, and the error that ended it.
type got struct {
	*http.Response
	body []byte
	err  error
}

func fetch(ctx context.Context, t *testing.T, method, url string, header ...string) got {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, method, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return got{resp, body, err}
}

func (f *FaultRegistry) layerURL(im *Image) string {
	return "http://" + f.Host() + "/v2/some/image/blobs/" + im.Layers[0].Digest.String()
}

func wantStatus(t *testing.T, g got, want int) {
	t.Helper()
	if g.StatusCode != want {
		t.Fatalf("%s %s: %s, want %d", g.Request.Method, g.Request.URL, g.Status, want)
	}
}

func TestFaultRegistryServes(t *testing.T) {
	f, im, layer := served(t, FaultOptions{})
	manifest, err := os.ReadFile(im.path(im.Manifest.Digest))
	if err != nil {
		t.Fatal(err)
	}
	size := len(layer)
	base := "http://" + f.Host() + "/v2/"
	for _, c := range []struct {
		name, path, ask string
		status          int
		body            []byte
		contentRange    string
	}{
		{name: "ping", path: "", status: 200},
		{name: "manifest by tag", path: "some/image/manifests/v1", status: 200, body: manifest},
		{name: "manifest by digest", path: "some/image/manifests/" + im.Manifest.Digest.String(), status: 200, body: manifest},
		{name: "another tag", path: "some/image/manifests/v2", status: 404},
		{name: "another blob", path: "some/image/blobs/sha256:" + strings.Repeat("0", 64), status: 404},
		{name: "whole", path: "blob", status: 200, body: layer},
		{name: "range", path: "blob", ask: "bytes=1000-1999", status: 206, body: layer[1000:2000], contentRange: fmt.Sprintf("bytes 1000-1999/%d", size)},
		{name: "open range", path: "blob", ask: "bytes=200000-", status: 206, body: layer[200000:], contentRange: fmt.Sprintf("bytes 200000-%d/%d", size-1, size)},
		{name: "range past the end", path: "blob", ask: "bytes=9999999-", status: 416},
	} {
		t.Run(c.name, func(t *testing.T) {
			url := base + c.path
			if c.path == "blob" {
				url = f.layerURL(im)
			}
			g := fetch(t.Context(), t, http.MethodGet, url, "Range", c.ask)
			wantStatus(t, g, c.status)
			if g.err != nil || !bytes.Equal(g.body, c.body) || g.Header.Get("Content-Range") != c.contentRange {
				t.Errorf("%d bytes, Content-Range %q, error %v; want %d bytes, %q", len(g.body), g.Header.Get("Content-Range"), g.err, len(c.body), c.contentRange)
			}
			if head := fetch(t.Context(), t, http.MethodHead, url, "Range", c.ask); head.StatusCode != c.status || len(c.body) > 0 && head.ContentLength != g.ContentLength {
				t.Errorf("HEAD says %s and %d bytes, GET %s and %d", head.Status, head.ContentLength, g.Status, g.ContentLength)
			}
		})
	}
}

// TestSentIsWhatCame compares with what comes out of the socket, header included, on both ways a body is sent.
func TestSentIsWhatCame(t *testing.T) {
	f, im, layer := served(t, FaultOptions{})
	for name, fault := range map[string]*Fault{"by the kernel": nil, "by copy": {Corrupt: Flip(77)}} {
		t.Run(name, func(t *testing.T) {
			f.Forget()
			f.SetRule(func(*http.Request) *Fault { return fault })
			var d net.Dialer
			conn, err := d.DialContext(t.Context(), "tcp", f.Host())
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", strings.TrimPrefix(f.layerURL(im), "http://"+f.Host())); err != nil {
				t.Fatal(err)
			}
			all, err := io.ReadAll(conn)
			if err != nil || f.Sent() != int64(len(all)) {
				t.Errorf("%d bytes came (%v), Sent says %d", len(all), err, f.Sent())
			}
			if n := f.SentBlob(im.Layers[0].Digest); n != int64(len(layer)) {
				t.Errorf("SentBlob says %d bytes, want %d", n, len(layer))
			}
		})
	}
}

func TestSendBuffer(t *testing.T) {
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, l)
	var d net.Dialer
	far, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, far)
	near, err := (&countedListener{TCPListener: l.(*net.TCPListener)}).Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, near)
	raw, err := near.(*countedConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var size int
	var sockErr error
	if err := raw.Control(func(fd uintptr) { size, sockErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_SNDBUF) }); err != nil || sockErr != nil {
		t.Fatal(err, sockErr)
	}
	if size != 2*sendBuffer { // the kernel doubles what is asked for, for its own bookkeeping
		t.Errorf("SO_SNDBUF is %d, want twice %d", size, sendBuffer)
	}
}

// TestFaults has a plain client see each fault.
func TestFaults(t *testing.T) {
	f, im, layer := served(t, FaultOptions{})
	ask := func(t *testing.T, fault Fault, header ...string) got {
		t.Helper()
		f.Forget()
		f.SetRule(func(*http.Request) *Fault { return &fault })
		return fetch(t.Context(), t, http.MethodGet, f.layerURL(im), header...)
	}
	for name, fault := range map[string]Fault{"": {}, ", changed": {Corrupt: func([]byte, int64) {}}} {
		for _, n := range []int64{1, 1000, 300_001} {
			t.Run(fmt.Sprintf("cut after %d%s", n, name), func(t *testing.T) {
				fault.CutAfter = n
				g := ask(t, fault)
				if int64(len(g.body)) != n || !errors.Is(g.err, io.ErrUnexpectedEOF) || !bytes.Equal(g.body, layer[:n]) {
					t.Errorf("%d bytes, %v, want %d and an unexpected end", len(g.body), g.err, n)
				}
			})
		}
	}
	t.Run("reset", func(t *testing.T) {
		const n = 300_001
		g := ask(t, Fault{ResetAfter: n})
		// What waited in the send buffer is gone, what the client's side had is not.
		if !errors.Is(g.err, syscall.ECONNRESET) || len(g.body) > n || !bytes.Equal(g.body, layer[:len(g.body)]) {
			t.Errorf("%d bytes, %v, want at most %d and a reset", len(g.body), g.err, n)
		}
		if sent := f.SentBlob(im.Layers[0].Digest); sent != n {
			t.Errorf("%d bytes were sent, want %d", sent, n)
		}
	})
	t.Run("range ignored", func(t *testing.T) {
		g := ask(t, Fault{IgnoreRange: true}, "Range", "bytes=10-19")
		if wantStatus(t, g, 200); !bytes.Equal(g.body, layer) || g.Header.Get("Content-Range") != "" {
			t.Errorf("%d bytes, Content-Range %q, want all %d", len(g.body), g.Header.Get("Content-Range"), len(layer))
		}
	})
	t.Run("wrong range", func(t *testing.T) {
		g := ask(t, Fault{WrongRange: 5}, "Range", "bytes=10-19")
		want := fmt.Sprintf("bytes 15-24/%d", len(layer))
		if wantStatus(t, g, 206); !bytes.Equal(g.body, layer[15:25]) || g.Header.Get("Content-Range") != want {
			t.Errorf("%d bytes, Content-Range %q, want 10, %q", len(g.body), g.Header.Get("Content-Range"), want)
		}
	})
	t.Run("short 206", func(t *testing.T) {
		g := ask(t, Fault{Short206: true}, "Range", "bytes=10-19")
		want := fmt.Sprintf("bytes 10-14/%d", len(layer))
		if wantStatus(t, g, 206); !bytes.Equal(g.body, layer[10:15]) || g.Header.Get("Content-Range") != want {
			t.Errorf("%d bytes, Content-Range %q, want 5, %q", len(g.body), g.Header.Get("Content-Range"), want)
		}
	})
	t.Run("status", func(t *testing.T) {
		g := ask(t, Fault{Status: http.StatusTooManyRequests, RetryAfter: 3 * time.Second})
		if wantStatus(t, g, 429); g.Header.Get("Retry-After") != "3" || len(g.body) != 0 {
			t.Errorf("Retry-After %q and %d bytes, want 3 and none", g.Header.Get("Retry-After"), len(g.body))
		}
	})
	t.Run("one byte", func(t *testing.T) {
		g := ask(t, Fault{Corrupt: Flip(500_000)}, "Range", "bytes=499990-600000")
		want := bytes.Clone(layer[499990:600001])
		want[10] ^= 0xff
		if wantStatus(t, g, 206); !bytes.Equal(g.body, want) {
			t.Error("not exactly the byte at 500000 is another one")
		}
		if g := ask(t, Fault{Corrupt: Flip(500_000)}, "Range", "bytes=0-499999"); !bytes.Equal(g.body, layer[:500_000]) {
			t.Error("a part without the byte is changed")
		}
	})
	t.Run("latency", func(t *testing.T) {
		begin := time.Now()
		if ask(t, Fault{Latency: 50 * time.Millisecond}); time.Since(begin) < 50*time.Millisecond {
			t.Error("answered too early")
		}
	})
	t.Run("pace", func(t *testing.T) {
		begin := time.Now()
		if ask(t, Fault{BytesPerSecond: 5 << 20}); time.Since(begin) < 190*time.Millisecond {
			t.Errorf("1 MiB at 5 MiB/s took %s", time.Since(begin))
		}
	})
}

// TestStall sends a part and nothing more until the client goes, or the registry does.
func TestStall(t *testing.T) {
	for _, end := range []string{"client leaves", "registry closes"} {
		t.Run(end, func(t *testing.T) {
			f, im, layer := served(t, FaultOptions{})
			f.SetRule(func(*http.Request) *Fault { return &Fault{StallAfter: 100} })
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.layerURL(im), http.NoBody)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client().Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			part := make([]byte, 100)
			if _, err := io.ReadFull(resp.Body, part); err != nil || !bytes.Equal(part, layer[:100]) {
				t.Fatalf("read the first part: %v", err)
			}
			next := make(chan error, 1)
			go func() {
				_, err := resp.Body.Read(part)
				next <- err
			}()
			select {
			case err := <-next:
				t.Fatalf("the connection went on: %v", err)
			case <-time.After(100 * time.Millisecond):
			}
			if end == "client leaves" {
				cancel()
			} else {
				closed(t, f)
			}
			if err := <-next; err == nil {
				t.Error("a byte came after the stall")
			}
			for f.Requests()[0].Ended().IsZero() {
				time.Sleep(time.Millisecond)
			}
		})
	}
}

// TestLimits gives each connection what it may have and all together no more than the total, in equal parts.
func TestLimits(t *testing.T) {
	const connections = 4
	for name, c := range map[string]struct {
		options FaultOptions
		rate    float64 // of all together
	}{
		"each":  {FaultOptions{PerConnection: 5 << 20}, connections * 5 << 20},
		"total": {FaultOptions{PerConnection: 5 << 20, Total: 10 << 20}, 10 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			f, im, layer := served(t, c.options)
			begin := time.Now()
			done := make(chan struct{}, connections)
			for range connections {
				go func() {
					defer func() { done <- struct{}{} }()
					fetch(t.Context(), t, http.MethodGet, f.layerURL(im))
				}()
			}
			<-done
			for _, r := range f.Requests() {
				if r.Bytes() < int64(len(layer))/2 {
					t.Errorf("%d bytes were sent to one when another had all %d", r.Bytes(), len(layer))
				}
			}
			for range connections - 1 {
				<-done
			}
			least := time.Duration(float64(connections*len(layer))/c.rate*float64(time.Second)) - credit
			if took := time.Since(begin); took < least {
				t.Errorf("took %s, want at least %s", took, least)
			}
		})
	}
}

// TestProxyFaults: the faults that a proxy shares with the registry happen there too.
func TestProxyFaults(t *testing.T) {
	data := bytes.Repeat([]byte("0123456789"), 100_000)
	origin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	}))
	defer origin.Close()
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	p, err := StartProxy(t.Context(), strings.TrimPrefix(origin.URL, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer closed(t, p)
	ask := func(fault Fault) got {
		p.SetRule(func(*http.Request) *Fault { return &fault })
		return fetch(t.Context(), t, http.MethodGet, "http://"+p.Host()+"/x", "Range", "bytes=1000-300999")
	}
	want := bytes.Clone(data[1000:301000])
	want[10] ^= 0xff
	if g := ask(Fault{Corrupt: Flip(1010)}); g.err != nil || !bytes.Equal(g.body, want) {
		t.Errorf("not exactly the byte at 1010 is another one (%v)", g.err)
	}
	if g := ask(Fault{CutAfter: 5000}); !errors.Is(g.err, io.ErrUnexpectedEOF) || len(g.body) != 5000 {
		t.Errorf("%d bytes, %v, want 5000 and an unexpected end", len(g.body), g.err)
	}
	if g := ask(Fault{ResetAfter: 200_000}); !errors.Is(g.err, syscall.ECONNRESET) || len(g.body) > 200_000 {
		t.Errorf("%d bytes, %v, want at most 200000 and a reset", len(g.body), g.err)
	}
}
