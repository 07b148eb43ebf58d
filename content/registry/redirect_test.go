package registry

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
)

const secretHeader = `
[host.%q]
  capabilities = ["pull"]
  ca = %q
  [host.%q.header]
    X-Registry-Key = "top-secret"
    authorization = ["Bearer from-hosts-toml"]
`

// TestRedirectToAnotherHost follows a registry to its store, on TLS, and looks
// at every header the store saw.
func TestRedirectToAnotherHost(t *testing.T) {
	t.Parallel()
	store := startTLS(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Query().Get("sig") != "good+sig" {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		serve(w, r)
	})
	reg := startTLS(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, store.URL+"/bucket/object?sig=good%2Bsig", http.StatusTemporaryRedirect)
	})
	root := certs(t, "images.example", fmt.Sprintf("server = %q\ncapabilities=[\"resolve\"]\n"+secretHeader, reg.URL, reg.URL, caFile(t, reg), reg.URL))
	s := only(t, newRegistry(t, Options{ConfigPath: root}), "images.example")
	parallel(t, s)
	mustFetch(t, s, 100, 100)

	got := reg.requests()
	if len(got) != 1 {
		t.Errorf("the registry was asked %d times, want once", len(got))
	}
	if h := got[0].Header; h.Get("X-Registry-Key") != "top-secret" || h.Get("Authorization") != "Bearer from-hosts-toml" {
		t.Errorf("the registry's own headers: %v", h)
	}
	if q := got[0].URL.Query(); q.Get("ns") != "images.example" {
		t.Errorf("a mirror was asked without ns: %v", q)
	}
	for _, r := range store.requests() {
		for _, name := range []string{"Authorization", "X-Registry-Key", "Cookie", "Referer"} {
			if v := r.Header.Values(name); len(v) > 0 {
				t.Errorf("the store saw %s: %v", name, v)
			}
		}
	}
	if n := len(store.requests()); n != 9 {
		t.Errorf("the store was asked %d times, want 9", n)
	}
}

func TestRedirectKeepsTokenToItself(t *testing.T) {
	t.Parallel()
	store := start(t, serve)
	server := start(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"token":"abc"}`)) })
	reg := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") == "" {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm=%q`, server.URL))
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		http.Redirect(w, r, store.URL, http.StatusFound)
	})
	root := certs(t, "images.example", fmt.Sprintf("server = %q\n[header]\n  x-key = \"top-secret\"\n", reg.URL))
	s := only(t, newRegistry(t, Options{ConfigPath: root}), "images.example")
	mustFetch(t, s, 0, 100)
	for _, h := range []*host{store, server} {
		for _, r := range h.requests() {
			if r.Header.Get("Authorization") != "" || r.Header.Get("X-Key") != "" {
				t.Errorf("%s saw %v", r.Host, r.Header)
			}
		}
	}
}

// TestExpiringRedirect renews the address once for many ranges.
func TestExpiringRedirect(t *testing.T) {
	t.Parallel()
	for _, code := range []int{400, 401, 403, 404} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			t.Parallel()
			var generation atomic.Int64
			store := start(t, func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Query().Get("sig") != fmt.Sprint(generation.Load()) {
					w.WriteHeader(code)
					return
				}
				serve(w, r)
			})
			reg := start(t, func(w http.ResponseWriter, r *http.Request) {
				http.Redirect(w, r, fmt.Sprintf("%s/?sig=%d", store.URL, generation.Load()), http.StatusTemporaryRedirect)
			})
			s := only(t, newRegistry(t, Options{}), reg.addr())
			parallel(t, s)
			generation.Add(1)
			parallel(t, s)
			mustFetch(t, s, 0, 100)
			if n := len(reg.requests()); n != 2 {
				t.Errorf("the registry was asked %d times, want twice", n)
			}
		})
	}
}

func TestRedirectFails(t *testing.T) {
	t.Parallel()
	var code atomic.Int64
	store := start(t, func(w http.ResponseWriter, r *http.Request) {
		if c := int(code.Load()); c != 200 {
			w.Header().Set("Retry-After", "3")
			w.WriteHeader(c)
			return
		}
		serve(w, r)
	})
	reg := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, store.URL+"/?secret-signature", http.StatusTemporaryRedirect)
	})
	s := only(t, newRegistry(t, Options{}), reg.addr())
	for _, c := range []struct {
		code, asked int // asked: how often the registry was, so far
		is          func(error) bool
	}{
		{403, 1, errdefs.IsPermissionDenied}, // fresh, so it is no expiry
		{200, 2, nil},
		{429, 2, errdefs.IsUnavailable}, // the address is still good
		{200, 2, nil},
		{503, 2, errdefs.IsUnavailable},
		{200, 3, nil},
		{404, 4, errdefs.IsNotFound}, // an old address is renewed before it is believed
		{200, 5, nil},
	} {
		code.Store(int64(c.code))
		_, err := fetch(t.Context(), s, 0, 10)
		if c.is == nil && err != nil || c.is != nil && !c.is(err) {
			t.Errorf("%d: %v", c.code, err)
		}
		if err != nil {
			contains(t, err, "redirected to "+store.addr())
			if strings.Contains(err.Error(), "secret-signature") {
				t.Errorf("the signature is in the error: %v", err)
			}
		}
		if n := len(reg.requests()); n != c.asked {
			t.Errorf("%d: the registry was asked %d times, want %d", c.code, n, c.asked)
		}
	}
	store.Close()
	if _, err := fetch(t.Context(), s, 0, 10); !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "secret-signature") {
		t.Errorf("store gone: %v", err)
	}
}

// TestRedirectOnOwnHost keeps Authorization, and loses it for good once away.
func TestRedirectOnOwnHost(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	seen := map[string]string{}
	var other *host
	reg := start(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		seen[r.URL.Path] = r.Header.Get("X-Key")
		mu.Unlock()
		switch r.URL.Path {
		case "/own":
			http.Redirect(w, r, other.URL, http.StatusPermanentRedirect)
		case "/back":
			serve(w, r)
		default:
			http.Redirect(w, r, "/own", http.StatusSeeOther)
		}
	})
	other = start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, reg.URL+"/back", http.StatusTemporaryRedirect)
	})
	root := certs(t, "images.example", fmt.Sprintf("server = %q\n[header]\n  x-key = \"k\"\n", reg.URL))
	mustFetch(t, only(t, newRegistry(t, Options{ConfigPath: root}), "images.example"), 0, 10)
	if seen["/own"] != "k" {
		t.Errorf("on its own host the header is missing")
	}
	// The guard goes by host: hosts.toml's headers are not secret from it.
	if got, ok := seen["/back"]; !ok || got != "" {
		t.Errorf("after a detour the header was sent: %q", got)
	}
}

func TestRedirectToPlainHTTPIsRefused(t *testing.T) {
	t.Parallel()
	store := start(t, serve)
	reg := startTLS(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, store.URL, http.StatusTemporaryRedirect)
	})
	root := certs(t, "images.example", fmt.Sprintf("server = %q\nca = %q\n", reg.URL, caFile(t, reg)))
	_, err := only(t, newRegistry(t, Options{ConfigPath: root}), "images.example").Open(t.Context(), 0, 10)
	if !errdefs.IsFailedPrecondition(err) || len(store.requests()) != 0 {
		t.Errorf("%v, %d requests in the clear", err, len(store.requests()))
	}
	contains(t, err, "plain http")
}

// TestFallbackIsForTheRegistryOnly: a registry on localhost may be plain, but
// an https address it points to is not tried without TLS.
func TestFallbackIsForTheRegistryOnly(t *testing.T) {
	t.Parallel()
	store := start(t, serve)
	reg := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://"+store.addr(), http.StatusTemporaryRedirect)
	})
	_, err := only(t, newRegistry(t, Options{}), reg.addr()).Open(t.Context(), 0, 10)
	if !errdefs.IsFailedPrecondition(err) || len(store.requests()) != 0 {
		t.Errorf("%v, %d requests in the clear", err, len(store.requests()))
	}
}
