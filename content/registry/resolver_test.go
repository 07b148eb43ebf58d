package registry

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var (
	manifest       = []byte(`{"schemaVersion":2,"mediaType":"` + ocispec.MediaTypeImageManifest + `"}`)
	manifestDigest = digest.FromBytes(manifest)
)

// serveManifest answers for the tag v1 and the digest.
func serveManifest(w http.ResponseWriter, r *http.Request) {
	switch {
	case strings.HasSuffix(r.URL.Path, "/"+repo+"/manifests/v1"), strings.HasSuffix(r.URL.Path, "/"+repo+"/manifests/"+manifestDigest.String()):
		w.Header().Set("Content-Type", ocispec.MediaTypeImageManifest)
		w.Header().Set("Docker-Content-Digest", manifestDigest.String())
		w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
		if r.Method != http.MethodHead {
			_, _ = w.Write(manifest)
		}
	case strings.HasSuffix(r.URL.Path, blobPath+blobDigest.String()):
		serve(w, r)
	default:
		w.WriteHeader(http.StatusNotFound)
	}
}

// resolve resolves ref and fetches its manifest.
func resolve(ctx context.Context, r *Registry, ref string) ([]byte, error) {
	resolver := r.Resolver()
	name, desc, err := resolver.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	if desc.Digest != manifestDigest || desc.Size != int64(len(manifest)) || desc.MediaType != ocispec.MediaTypeImageManifest {
		return nil, fmt.Errorf("resolved to %+v", desc)
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	body, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer func() { _ = body.Close() }()
	return io.ReadAll(body)
}

func mustResolve(t *testing.T, r *Registry, ref string) {
	t.Helper()
	if got, err := resolve(t.Context(), r, ref); err != nil || string(got) != string(manifest) {
		t.Errorf("%s: %q, %v", ref, got, err)
	}
}

// TestResolver goes through a mirror that may not say what a tag is, with the
// settings of hosts.toml, to a registry that wants a login.
func TestResolver(t *testing.T) {
	t.Parallel()
	k := newTokens(t, "")
	k.content = serveManifest
	mirror := startTLS(t, serveManifest)
	root := certs(t, "images.example", fmt.Sprintf("server = %q\n[host.%q]\n  capabilities = [\"pull\"]\n  ca = %q\n  [host.%q.header]\n    x-key = \"top-secret\"\n",
		k.registry.URL, mirror.URL, caFile(t, mirror), mirror.URL))
	var hosts []string
	r := newRegistry(t, Options{ConfigPath: root, UserAgent: "gantry/test", Credentials: func(host string) (string, string, error) {
		hosts = append(hosts, host)
		return "user", "secret", nil
	}})
	mustResolve(t, r, "images.example/"+repo+":v1")
	mustResolve(t, r, "images.example/"+repo+"@"+manifestDigest.String())
	mustFetch(t, sources(t, r, "images.example")[1], 0, 10)
	if n := k.count(); n != 1 || len(hosts) != 1 || hosts[0] != k.registry.addr() {
		t.Errorf("%d tokens, credentials of %v: the resolver and the sources do not share", n, hosts)
	}
	for _, q := range mirror.requests() {
		if q.UserAgent() != "gantry/test" || q.Header.Get("X-Key") != "top-secret" || q.URL.Query().Get("ns") != "images.example" || q.Header.Get("Authorization") != "" {
			t.Errorf("the mirror was asked %s %v", q.URL, q.Header)
		}
		if strings.HasSuffix(q.URL.Path, "/v1") {
			t.Error("the mirror was asked for a tag")
		}
	}
	if n := len(mirror.requests()); n != 3 { // a fetch, then a HEAD and a fetch
		t.Errorf("the mirror was asked %d times", n)
	}
	for _, q := range k.registry.requests() {
		if q.Header.Get("X-Key") != "" || q.UserAgent() != "gantry/test" {
			t.Errorf("the registry was asked %s %v", q.URL, q.Header)
		}
	}
	if q := k.server.requests()[0]; q.UserAgent() != "gantry/test" {
		t.Errorf("the token server was asked by %s", q.UserAgent())
	}
	k.revoke()
	mustResolve(t, r, "images.example/"+repo+":v1")
}

// TestResolverFollows gives a redirect neither a token nor a header, and keeps
// its address out of errors.
func TestResolverFollows(t *testing.T) {
	t.Parallel()
	gone := false
	store := start(t, func(w http.ResponseWriter, r *http.Request) {
		if gone {
			panic(http.ErrAbortHandler)
		}
		serveManifest(w, r)
	})
	k := newTokens(t, "")
	k.content = func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, store.URL+r.URL.Path+"?signature", http.StatusTemporaryRedirect)
	}
	root := certs(t, "images.example", fmt.Sprintf("server = %q\n[header]\n  x-key = \"top-secret\"\n", k.registry.URL))
	r := newRegistry(t, Options{ConfigPath: root})
	mustResolve(t, r, "images.example/"+repo+":v1")
	if len(store.requests()) != 2 {
		t.Errorf("%d requests to the store", len(store.requests()))
	}
	for _, q := range store.requests() {
		if q.Header.Get("Authorization")+q.Header.Get("X-Key")+q.Referer() != "" {
			t.Errorf("the store saw %v", q.Header)
		}
	}
	gone = true
	_, err := resolve(t.Context(), r, "images.example/"+repo+":v1")
	if !errdefs.IsUnavailable(err) || strings.Contains(err.Error(), "signature") {
		t.Errorf("error %v", err)
	}
}

func TestResolverFails(t *testing.T) {
	t.Parallel()
	silent := start(t, func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodHead {
			serveManifest(w, r)
			return
		}
		w.Header().Set("Content-Length", fmt.Sprint(len(manifest)))
		_, _ = w.Write(manifest[:5])
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	private, other := basic(t, serveManifest), basic(t, serveManifest)
	loop := start(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, r.URL.Path, http.StatusFound) })
	elsewhere := start(t, func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, other.URL+r.URL.Path, http.StatusTemporaryRedirect)
	})
	var asked []string
	for _, c := range []struct {
		host string
		is   func(error) bool
	}{
		{silent.addr(), errdefs.IsUnavailable},
		{private.addr(), errdefs.IsUnauthorized},
		{loop.addr(), errdefs.IsFailedPrecondition},
		{elsewhere.addr(), func(err error) bool { return err != nil }},
		{"-", errdefs.IsInvalidArgument},
		{start(t, http.NotFound).addr(), errdefs.IsNotFound},
	} {
		r := newRegistry(t, Options{StallTimeout: 200 * time.Millisecond, Credentials: func(host string) (string, string, error) {
			asked = append(asked, host)
			return "user", "wrong", nil
		}})
		if _, err := resolve(t.Context(), r, c.host+"/"+repo+":v1"); !c.is(err) {
			t.Errorf("%s: %v", c.host, err)
		}
	}
	for _, host := range asked {
		if host != private.addr() {
			t.Errorf("credentials of %s were asked for", host)
		}
	}
	if len(other.requests()) == 0 {
		t.Error("the redirect was not followed")
	}
	for _, q := range other.requests() {
		if q.Header.Get("Authorization") != "" {
			t.Errorf("sent by a redirect, with %v", q.Header)
		}
	}
}
