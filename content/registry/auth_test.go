package registry

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// tokens is a registry that wants Bearer tokens, and its token server.
type tokens struct {
	registry, server *host
	mu               sync.Mutex
	valid            string
	issued           int
	before           func(w http.ResponseWriter, r *http.Request) bool // on the token server; true: answered
	content          http.HandlerFunc                                  // of the registry, with a good token
}

func newTokens(t *testing.T, challenge string) *tokens {
	t.Helper()
	k := &tokens{content: serve}
	k.server = start(t, func(w http.ResponseWriter, r *http.Request) {
		if k.before != nil && k.before(w, r) {
			return
		}
		k.mu.Lock()
		defer k.mu.Unlock()
		k.issued++
		k.valid = fmt.Sprintf("token%d", k.issued)
		w.Header().Set("Content-Type", "application/json")
		_, _ = fmt.Fprintf(w, `{"token":%q,"access_token":%q}`, k.valid, k.valid)
	})
	k.registry = start(t, func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		ok := k.valid != "" && r.Header.Get("Authorization") == "Bearer "+k.valid
		k.mu.Unlock()
		if !ok {
			c := fmt.Sprintf(`Bearer realm="%s/token",service="test",scope="repository:%s:pull"`, k.server.URL, repo)
			if r.Header.Get("Authorization") != "" {
				c += challenge
			}
			w.Header().Set("WWW-Authenticate", c)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		k.content(w, r)
	})
	return k
}

func (k *tokens) count() int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.issued
}

func (k *tokens) revoke() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.valid = "gone"
}

func TestBearer(t *testing.T) {
	t.Parallel()
	// Some registries say why a token is refused, some do not.
	for _, challenge := range []string{"", `,error="invalid_token"`} {
		t.Run("anonymous"+challenge, func(t *testing.T) {
			t.Parallel()
			k := newTokens(t, challenge)
			r := newRegistry(t, Options{})
			s := only(t, r, k.registry.addr())
			parallel(t, s)
			mustFetch(t, only(t, r, k.registry.addr()), 10, 10) // another source, the same token
			if n := k.count(); n != 1 {
				t.Errorf("%d tokens, want 1", n)
			}
			q := k.server.requests()[0].URL.Query()
			if q.Get("service") != "test" || q.Get("scope") != "repository:"+repo+":pull" || len(q["scope"]) != 1 {
				t.Errorf("asked for %v", q)
			}
			k.revoke()
			parallel(t, s)
			if n := k.count(); n != 2 {
				t.Errorf("%d tokens after one was revoked, want 2", n)
			}
		})
	}
}

// parallel fetches eight ranges at once.
func parallel(t *testing.T, s *Source) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range int64(8) {
		wg.Go(func() {
			if _, err := fetch(t.Context(), s, i*100, 100); err != nil {
				t.Errorf("range %d: %v", i, err)
			}
		})
	}
	wg.Wait()
}

func TestBearerWithCredentials(t *testing.T) {
	t.Parallel()
	k := newTokens(t, "")
	var form url.Values
	k.before = func(_ http.ResponseWriter, r *http.Request) bool {
		_ = r.ParseForm()
		form = r.PostForm
		return false
	}
	var asked []string
	r := newRegistry(t, Options{Credentials: func(host string) (string, string, error) {
		asked = append(asked, host)
		return "user", "secret", nil
	}})
	mustFetch(t, only(t, r, k.registry.addr()), 0, 10)
	if form.Get("username") != "user" || form.Get("password") != "secret" {
		t.Errorf("form %v", form)
	}
	if len(asked) != 1 || asked[0] != k.registry.addr() {
		t.Errorf("credentials asked for %v", asked)
	}
}

// TestTokenServerFails also shows that a failure is not kept, as containerd's
// authorizer would.
func TestTokenServerFails(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		before func(http.ResponseWriter, *http.Request) bool
		is     func(error) bool
	}{
		{"401", status(401), errdefs.IsUnauthorized},
		{"403", status(403), errdefs.IsPermissionDenied},
		{"404", status(404), errdefs.IsUnauthorized},
		{"429", status(429), errdefs.IsUnavailable},
		{"503", status(503), errdefs.IsUnavailable},
		{"no token", func(w http.ResponseWriter, _ *http.Request) bool { _, _ = w.Write([]byte("{}")); return true }, errdefs.IsUnauthorized},
		{"endless", func(w http.ResponseWriter, _ *http.Request) bool {
			_, err := w.Write([]byte(`{"token":"`))
			for x := []byte(strings.Repeat("x", 1<<16)); err == nil; {
				_, err = w.Write(x)
			}
			return true
		}, errdefs.IsUnavailable},
		{"silent", func(_ http.ResponseWriter, r *http.Request) bool { <-r.Context().Done(); return true }, errdefs.IsUnavailable},
		{"reset", func(http.ResponseWriter, *http.Request) bool { panic(http.ErrAbortHandler) }, errdefs.IsUnavailable},
		{"sends on", func(w http.ResponseWriter, r *http.Request) bool {
			http.Redirect(w, r, "http://127.0.0.1:1/token", http.StatusTemporaryRedirect)
			return true
		}, errdefs.IsFailedPrecondition},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			k := newTokens(t, "")
			var fail atomic.Bool
			fail.Store(true)
			k.before = func(w http.ResponseWriter, r *http.Request) bool { return fail.Load() && c.before(w, r) }
			s := only(t, newRegistry(t, Options{TokenTimeout: 500 * time.Millisecond}), k.registry.addr())
			for range 2 {
				if _, err := s.Open(t.Context(), 0, 10); !c.is(err) {
					t.Errorf("error %v", err)
				}
			}
			fail.Store(false)
			mustFetch(t, s, 0, 10)
		})
	}
}

func status(code int) func(http.ResponseWriter, *http.Request) bool {
	return func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(code); return true }
}

func TestBasic(t *testing.T) {
	t.Parallel()
	want := "Basic " + base64.StdEncoding.EncodeToString([]byte("user:secret"))
	h := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != want {
			w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		serve(w, r)
	})
	creds := func(user, secret string, err error) func(string) (string, string, error) {
		return func(string) (string, string, error) { return user, secret, err }
	}
	for _, c := range []struct {
		name  string
		creds func(string) (string, string, error)
		ok    bool
	}{
		{"right", creds("user", "secret", nil), true},
		{"wrong", creds("user", "other", nil), false},
		{"nobody", creds("", "", nil), false},
		{"helper fails", creds("", "", errors.New("helper failed")), false},
		{"no helper", nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			s := only(t, newRegistry(t, Options{Credentials: c.creds}), h.addr())
			got, err := fetch(t.Context(), s, 0, 10)
			if c.ok && (err != nil || len(got) != 10) || !c.ok && !errdefs.IsUnauthorized(err) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if err != nil && strings.Contains(err.Error(), "other") {
				t.Errorf("the secret is in the error: %v", err)
			}
		})
	}
}

func TestHostileChallenges(t *testing.T) {
	t.Parallel()
	for _, c := range []string{
		`Bearer`, `Bearer realm="%zz"`, `Bearer realm="file:///etc/passwd"`, `Bearer realm=""`, `Digest realm="x"`,
		`Bearer realm="http://127.0.0.1:1/` + strings.Repeat("x", 3000) + `"`, `,,,;;;="`, strings.Repeat("Basic ", 500),
	} {
		h := start(t, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", c)
			w.WriteHeader(http.StatusUnauthorized)
		})
		_, err := only(t, newRegistry(t, Options{}), h.addr()).Open(t.Context(), 0, 10)
		if err == nil || !errdefs.IsUnauthorized(err) && !errdefs.IsUnavailable(err) {
			t.Errorf("%.60s: %v", c, err)
		} else if len(err.Error()) > 700 {
			t.Errorf("%.60s: error of %d bytes", c, len(err.Error()))
		}
		if n := len(h.requests()); n > maxLogins+1 {
			t.Errorf("%.60s: asked %d times", c, n)
		}
	}
}
