package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/content/transfer"
)

// TestSourcesAreShared compares what two callers get.
func TestSourcesAreShared(t *testing.T) {
	t.Parallel()
	root := certs(t, "images.example", "[host.\"https://m.example\"]\n")
	r := newRegistry(t, Options{ConfigPath: root})
	get := func(repository string, d digest.Digest, size int64) *Source {
		t.Helper()
		s, err := r.Sources(t.Context(), "images.example", repository, d, size)
		if err != nil || len(s) != 2 {
			t.Fatalf("%d sources, %v", len(s), err)
		}
		if s[0].Tier() != 0 || s[1].Tier() != 1 {
			t.Errorf("tiers %d, %d", s[0].Tier(), s[1].Tier())
		}
		return s[0]
	}
	first := get(repo, blobDigest, 5)
	if get(repo, blobDigest, 5) != first {
		t.Error("two sources of one blob")
	}
	for _, other := range []*Source{get(repo+"2", blobDigest, 5), get(repo, digest.FromString("x"), 5), get(repo, blobDigest, 6)} {
		if other == first {
			t.Error("one source of two blobs")
		}
	}
	ep := first.ep
	addHosts(t, root, "images.example", "[host.\"https://m.example:5000\"]\n")
	if get(repo, blobDigest, 5) == first {
		t.Error("a source outlives its hosts file")
	}
	runtime.KeepAlive(first)
	for range 1000 {
		runtime.GC()
		ep.mu.Lock()
		n := len(ep.sources)
		ep.mu.Unlock()
		if n == 0 {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Error("sources that nobody has are kept")
}

func TestTiers(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		toml string
		want []int
	}{
		"no file":                 {"", []int{1}},
		"server by another name":  {"server = \"https://a.example\"\n[host.\"https://b.example\"]\n", []int{0, 1}},
		"server among the hosts":  {"server = \"https://a.example\"\n[host.\"https://a.example\"]\n[host.\"https://b.example\"]\n", []int{1, 0}},
		"itself among the hosts":  {"[host.\"https://images.example\"]\n[host.\"https://b.example\"]\n", []int{1, 0}},
		"server that only pushes": {"server = \"https://a.example\"\ncapabilities=[\"push\"]\n[host.\"https://b.example\"]\n", []int{0}},
	} {
		r := newRegistry(t, Options{ConfigPath: certs(t, "images.example", c.toml)})
		var got []int
		for _, s := range sources(t, r, "images.example") {
			got = append(got, s.Tier())
		}
		if fmt.Sprint(got) != fmt.Sprint(c.want) {
			t.Errorf("%s: tiers %v, want %v", name, got, c.want)
		}
	}
}

// TestRedirectIsFollowedOnce counts first legs while eight connections of two
// callers fetch one blob with signatures that go bad after ten replies each.
func TestRedirectIsFollowedOnce(t *testing.T) {
	t.Parallel()
	var served atomic.Int64
	signature := func() string { return fmt.Sprint(served.Load() / 10) }
	store := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("sig") != signature() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		served.Add(1)
		serve(w, r)
	})
	var mu sync.Mutex
	asked := map[string]int{}
	reg := start(t, func(w http.ResponseWriter, r *http.Request) {
		sig := signature()
		mu.Lock()
		asked[sig]++
		mu.Unlock()
		http.Redirect(w, r, store.URL+"/?sig="+sig, http.StatusTemporaryRedirect)
	})
	r := newRegistry(t, Options{})
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			s := only(t, r, reg.addr())
			for j := range int64(6) {
				if _, err := fetch(t.Context(), s, i*1000+j*100, 100); err != nil {
					t.Errorf("range %d of %d: %v", j, i, err)
				}
			}
		})
	}
	wg.Wait()
	for sig, n := range asked {
		if n != 1 {
			t.Errorf("signature %s was asked for %d times", sig, n)
		}
	}
	if n, want := len(asked), 5; n != want { // 48 replies
		t.Errorf("%d signatures, want %d", n, want)
	}
}

// TestOneRenewalForAll lets a token go bad under eight connections that fetch
// two blobs of a repository, from a token server that takes its time.
func TestOneRenewalForAll(t *testing.T) {
	t.Parallel()
	k := newTokens(t, "")
	k.before = func(http.ResponseWriter, *http.Request) bool { time.Sleep(50 * time.Millisecond); return false }
	r := newRegistry(t, Options{})
	fetchBoth := func() {
		var wg sync.WaitGroup
		for _, size := range []int64{int64(len(blob)), 1000} { // two digests would be one to this server
			wg.Go(func() {
				s, err := r.Sources(t.Context(), k.registry.addr(), repo, digest.FromString(fmt.Sprint(size)), int64(len(blob)))
				if err != nil {
					t.Error(err)
					return
				}
				parallel(t, s[0])
			})
		}
		wg.Wait()
	}
	for i := range 4 {
		fetchBoth()
		if n := k.count(); n != i+1 {
			t.Errorf("%d tokens, want %d", n, i+1)
		}
		k.revoke()
	}
}

// TestWaitForTokenEnds cancels requests while a token server, or a credential
// helper, keeps them waiting.
func TestWaitForTokenEnds(t *testing.T) {
	t.Parallel()
	release, busy := make(chan struct{}), make(chan struct{}, 16)
	var once sync.Once
	t.Cleanup(func() { once.Do(func() { close(release) }) })
	slow := newTokens(t, "")
	slow.before = func(http.ResponseWriter, *http.Request) bool { busy <- struct{}{}; <-release; return false }
	quick := newTokens(t, "")
	hung := func(string) (string, string, error) { busy <- struct{}{}; <-release; return "", "", nil }
	for name, s := range map[string]*Source{
		"server": only(t, newRegistry(t, Options{}), slow.registry.addr()),
		"helper": only(t, newRegistry(t, Options{Credentials: hung}), quick.registry.addr()),
	} {
		told := errors.New("told to stop")
		first, cancel := context.WithCancelCause(t.Context())
		errs := make(chan error, 2)
		open := func(ctx context.Context) {
			_, err := s.Open(ctx, 0, 10)
			errs <- err
		}
		go open(first)
		<-busy
		second, cancelSecond := context.WithCancelCause(t.Context())
		go open(second)
		cancelSecond(told)
		if err := <-errs; !errors.Is(err, told) {
			t.Errorf("%s: who waits for another: %v", name, err)
		}
		cancel(told)
		if err := <-errs; !errors.Is(err, told) {
			t.Errorf("%s: %v", name, err)
		}
	}
	once.Do(func() { close(release) })
	mustFetch(t, only(t, newRegistry(t, Options{}), slow.registry.addr()), 0, 10)
}

func TestTokenServerSaysWhen(t *testing.T) {
	t.Parallel()
	k := newTokens(t, "")
	k.before = func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("Retry-After", "7")
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	_, err := only(t, newRegistry(t, Options{}), k.registry.addr()).Open(t.Context(), 0, 10)
	var later interface{ RetryAfter() time.Duration }
	if !errors.As(err, &later) || later.RetryAfter() != 7*time.Second || !errdefs.IsUnavailable(err) {
		t.Errorf("error %v", err)
	}
}

// basic is a registry with a Basic login.
func basic(t *testing.T, content http.HandlerFunc) *host {
	return start(t, func(w http.ResponseWriter, r *http.Request) {
		if user, secret, _ := r.BasicAuth(); user != "user" || secret != "secret" {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		content(w, r)
	})
}

// TestCredentialsStayAtHome has a login for one host only, and a mirror, a
// store and a detour that all ask for one.
func TestCredentialsStayAtHome(t *testing.T) {
	t.Parallel()
	mirror, store := basic(t, serve), basic(t, serve)
	var elsewhere string
	origin := basic(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, elsewhere, http.StatusTemporaryRedirect)
	})
	detour := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, origin.URL+"/back", http.StatusTemporaryRedirect)
	})
	within := basic(t, serve)
	hall := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/" {
			http.Redirect(w, r, "/within", http.StatusTemporaryRedirect)
			return
		}
		within.Config.Handler.ServeHTTP(w, r)
	})
	root := certs(t, "images.example", fmt.Sprintf("server = %q\n[host.%q]\n", origin.URL, mirror.URL))
	r := newRegistry(t, Options{ConfigPath: root, Credentials: func(host string) (string, string, error) {
		if host != origin.addr() && host != mirror.addr() {
			t.Errorf("asked for the credentials of %s", host)
		}
		if host == origin.addr() {
			return "user", "secret", nil
		}
		return "", "", nil
	}})
	for _, elsewhere = range []string{store.URL, detour.URL, hall.URL} {
		for _, s := range sources(t, r, "images.example") {
			if _, err := s.Open(t.Context(), 0, 10); !errdefs.IsUnauthorized(err) {
				t.Errorf("error %v", err)
			}
		}
	}
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:secret"))
	for _, q := range slices.Concat(mirror.requests(), store.requests(), detour.requests(), hall.requests()) {
		if q.Header.Get("Authorization") != "" {
			t.Errorf("%s saw %v", q.Host, q.Header)
		}
	}
	for _, q := range origin.requests()[1:] {
		if got := q.Header.Get("Authorization"); (q.URL.Path == "/back") != (got == "") || got != "" && got != want {
			t.Errorf("%s: %q", q.URL.Path, got)
		}
	}
}

// TestPasswordInTheClear: a registry on localhost, where http is allowed, names
// a token server elsewhere.
func TestPasswordInTheClear(t *testing.T) {
	t.Parallel()
	h := start(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="http://192.0.2.1/token",service="x"`)
		w.WriteHeader(http.StatusUnauthorized)
	})
	creds := func(string) (string, string, error) { return "user", "secret", nil }
	_, err := only(t, newRegistry(t, Options{Credentials: creds}), h.addr()).Open(t.Context(), 0, 10)
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("error %v", err)
	}
	contains(t, err, "192.0.2.1: plain http is refused")
}

// TestCredentialsFail says which file is to blame, as a login that failed, not as a network that did.
func TestCredentialsFail(t *testing.T) {
	t.Parallel()
	file := dockerConfig(t, `{"auths"`)
	for _, path := range []string{file, filepath.Join(file, "below", "a-file")} {
		creds, err := DockerCredentials(path)
		if err != nil {
			t.Fatal(err)
		}
		for name, addr := range map[string]string{"bearer": newTokens(t, "").registry.addr(), "basic": basic(t, serve).addr()} {
			_, err = only(t, newRegistry(t, Options{Credentials: creds}), addr).Open(t.Context(), 0, 10)
			if !errdefs.IsUnauthorized(err) || errdefs.IsUnavailable(err) {
				t.Errorf("%s: %v", name, err)
			}
			contains(t, err, path, "cannot be used")
		}
	}
}

// TestFewConnections counts TCP connections for fifty ranges of four workers,
// which read as a transfer does: what was announced, not the end after it.
func TestFewConnections(t *testing.T) {
	t.Parallel()
	for name, run := range map[string]func(*httptest.Server){"plain": (*httptest.Server).Start, "TLS": (*httptest.Server).StartTLS} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var accepted, closed atomic.Int64
			h := newHost(t, serve, func(s *httptest.Server) {
				s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
					switch state {
					case http.StateNew:
						accepted.Add(1)
					case http.StateClosed:
						closed.Add(1)
					}
				}
				run(s)
			})
			toml := fmt.Sprintf("server = %q\n", h.URL)
			if h.TLS != nil {
				toml += fmt.Sprintf("ca = %q\n", caFile(t, h))
			}
			s := only(t, newRegistry(t, Options{ConfigPath: certs(t, "images.example", toml)}), "images.example")
			open := func(i int64) transfer.Body {
				b, err := s.Open(t.Context(), i*4000, 4000)
				if err != nil {
					t.Errorf("range %d: %v", i, err)
					b.ReadCloser = http.NoBody
				}
				return b
			}
			read := func(i int64, b transfer.Body) {
				got := make([]byte, 4000)
				if _, err := io.ReadFull(b, got); err != nil || !bytes.Equal(got, blob[i*4000:][:4000]) {
					t.Errorf("range %d: %v", i, err)
				}
				_ = b.Close()
			}
			var first [4]transfer.Body // at once, so that four connections are there
			for i := range first {
				first[i] = open(int64(i))
			}
			for i, b := range first {
				read(int64(i), b)
			}
			next := make(chan int64)
			var wg sync.WaitGroup
			for range first {
				wg.Go(func() {
					for i := range next {
						read(i, open(i))
					}
				})
			}
			for i := range int64(50) {
				next <- i
			}
			close(next)
			wg.Wait()
			if accepted.Load() != 4 || closed.Load() != 0 {
				t.Errorf("%d connections, of which %d were closed", accepted.Load(), closed.Load())
			}
		})
	}
}

// FuzzChallenge learns from a 401 and asks a token server that cannot be reached.
func FuzzChallenge(f *testing.F) {
	for _, c := range []string{`Bearer realm="https://a/token",service="s",scope="repository:a:pull"`, `Basic realm="x"`, `Bearer realm=`, `Bearer realm="%zz"`, `,,=;"`, `Bearer error="invalid_token",realm="http://a"`} {
		f.Add(c)
	}
	transport := roundTrip(func(*http.Request) (*http.Response, error) { return nil, io.ErrUnexpectedEOF })
	ep := &endpoint{name: "a", host: "a", header: http.Header{}, policy: &policy{host: "a"}, transport: transport, opts: Options{Credentials: func(string) (string, string, error) {
		return "user", topSecret, nil
	}}.withDefaults()}
	req := httptest.NewRequestWithContext(context.Background(), http.MethodGet, "https://a/v2/", nil)
	f.Fuzz(func(t *testing.T, challenge string) {
		a := newAuth(ep, repo)
		resp := &http.Response{StatusCode: http.StatusUnauthorized, Header: http.Header{"Www-Authenticate": {challenge}}, Request: req}
		err := a.challenge(t.Context(), a.gen, resp)
		if err == nil {
			_, err = a.authorize(t.Context(), req.Clone(t.Context()))
		}
		if err != nil && (!errdefs.IsUnauthorized(err) && !errdefs.IsUnavailable(err) || len(err.Error()) > 500 || bytes.Contains([]byte(err.Error()), []byte(topSecret))) {
			t.Fatalf("%q: %v", challenge, err)
		}
	})
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }
