package registry

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	// containerd's package says for every test server on localhost that it tries https first.
	if err := log.SetLevel("warn"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const repo = "library/thing"

// blob is what the test servers serve.
var blob = func() []byte {
	b := make([]byte, 200_000)
	r := rand.New(rand.NewPCG(3, 4))
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}()

var blobDigest = digest.FromBytes(blob)

const blobPath = "/v2/" + repo + "/blobs/"

// serve answers a range request as a good registry does.
func serve(w http.ResponseWriter, r *http.Request) {
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(blob))
}

// host is a server that keeps what it was asked.
type host struct {
	*httptest.Server
	mu   sync.Mutex
	seen []*http.Request
}

// start runs a plain HTTP server, startTLS one with httptest's certificate.
func start(t *testing.T, h http.HandlerFunc) *host { return newHost(t, h, (*httptest.Server).Start) }
func startTLS(t *testing.T, h http.HandlerFunc) *host {
	return newHost(t, h, (*httptest.Server).StartTLS)
}

func newHost(t *testing.T, h http.HandlerFunc, run func(*httptest.Server)) *host {
	t.Helper()
	s := &host{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		s.seen = append(s.seen, r.Clone(context.WithoutCancel(r.Context())))
		s.mu.Unlock()
		h(w, r)
	}))
	s.Config.ErrorLog = discardLog
	run(s.Server)
	t.Cleanup(s.Close)
	return s
}

// addr is host:port, as in an image's name.
func (s *host) addr() string { return s.Listener.Addr().String() }

func (s *host) requests() []*http.Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*http.Request(nil), s.seen...)
}

// newRegistry returns a Registry whose idle connections end with the test.
func newRegistry(t *testing.T, o Options) *Registry {
	t.Helper()
	r := New(o)
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r
}

func sources(t *testing.T, r *Registry, host string) []*Source {
	t.Helper()
	s, err := r.Sources(t.Context(), host, repo, blobDigest, int64(len(blob)))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// only returns the one source of a host.
func only(t *testing.T, r *Registry, host string) *Source {
	t.Helper()
	s := sources(t, r, host)
	if len(s) != 1 {
		t.Fatalf("%d sources, want 1", len(s))
	}
	return s[0]
}

// fetch opens and reads a range, and returns the error of either.
func fetch(ctx context.Context, s *Source, off, n int64) ([]byte, error) {
	b, err := s.Open(ctx, off, n)
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(b)
	if err := b.Close(); err != nil {
		return nil, err
	}
	if err == nil && int64(len(data)) != b.N {
		return data, fmt.Errorf("%d bytes where N was %d", len(data), b.N)
	}
	return data, err
}

// mustFetch fetches a range and compares it.
func mustFetch(t *testing.T, s *Source, off, n int64) {
	t.Helper()
	got, err := fetch(t.Context(), s, off, n)
	if err != nil {
		t.Fatalf("%d bytes from %d: %v", n, off, err)
	}
	if !bytes.Equal(got, blob[off:off+n]) {
		t.Fatalf("%d bytes from %d: other bytes", n, off)
	}
}

// certs writes a folder of hosts files and returns its root.
func certs(t *testing.T, folder, toml string) string {
	t.Helper()
	root := t.TempDir()
	addHosts(t, root, folder, toml)
	return root
}

func addHosts(t *testing.T, root, folder, toml string) {
	t.Helper()
	write(t, filepath.Join(root, folder, "hosts.toml"), toml)
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func contains(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, w := range words {
		if err == nil || !strings.Contains(err.Error(), w) {
			t.Errorf("error %v does not say %q", err, w)
		}
	}
}
