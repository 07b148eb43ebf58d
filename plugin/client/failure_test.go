package client

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// TestExplain has errors as containerd sends them, and wants each thing said once.
func TestExplain(t *testing.T) {
	t.Parallel()
	dgst := digest.FromString("layer")
	copying := errors.New("failed to copy: could not fetch content descriptor " + dgst.String() + " from remote: not found")
	gantryd := Layer{Digest: dgst, Phase: PhaseWaiting, Error: "blob " + dgst.String() + ": host r.example, attempt 1: 404 Not Found: not found"}
	for name, tc := range map[string]struct {
		err    error
		layers []Layer
		want   string
	}{
		"no such tag": {fmt.Errorf("failed to resolve image: r.example/a:1: %w", errdefs.ErrNotFound), nil,
			"image r.example/a:1: failed to resolve image: not found\n" +
				"r.example has no such repository or tag, or hides it from who may not read it"},
		"joined many times over": {errors.Join(copying, copying, errdefs.ErrNotFound, errdefs.ErrNotFound), nil,
			"image r.example/a:1: " + copying.Error()},
		"gantryd knows more": {copying, []Layer{{Digest: digest.FromString("other"), Error: "another"}, gantryd},
			"image r.example/a:1: " + copying.Error() + "\ngantryd: " + gantryd.Error},
		"told by both": {errors.New(gantryd.Error), []Layer{gantryd}, "image r.example/a:1: " + gantryd.Error},
		"not let in": {errors.New("failed to resolve image: unexpected status: 401 Unauthorized"), nil,
			"image r.example/a:1: failed to resolve image: unexpected status: 401 Unauthorized\n" +
				"/absent/config.json has no login for r.example (docker login r.example)"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := node(t)
			c.Registry.Credentials = "/absent/config.json"
			p, err := New(c, Options{Ref: "r.example/a:1"})
			if err != nil {
				t.Fatal(err)
			}
			if got := p.explain(tc.err, tc.layers); got.Error() != tc.want || !errors.Is(got, tc.err) {
				t.Errorf("got\n%v\nwant\n%s", got, tc.want)
			}
		})
	}
}

// TestOneOfManyFails wants the blob that is missing named, with its host, and no other layer called failed.
func TestOneOfManyFails(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	_, layers := s.image(t, "v1", 40, 100_000, 100_000, 100_000)
	missing := layers[1].Digest.String()
	s.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.Contains(r.URL.Path, "/blobs/") {
			return false
		}
		if strings.HasSuffix(r.URL.Path, missing) {
			w.WriteHeader(http.StatusNotFound)
			return true
		}
		<-r.Context().Done() // the others are at it
		return true
	})
	_, states, err := pull(t, node(t, s), Options{Ref: s.ref("v1")})
	want := "image " + s.ref("v1") + ": blob " + missing + ": no host serves the blob: host " + s.host() + ", attempt 1: 404 Not Found: not found"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	for i, l := range states[len(states)-1].Layers {
		if failed := l.Phase == PhaseFailed; failed != (i == 1) {
			t.Errorf("layer %d: got %+v", i, l)
		}
	}
}

// TestRefusedLogin wants the file and the user named that a registry does not let in.
func TestRefusedLogin(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	s.image(t, "v1", 41, 1000)
	s.setFault(func(w http.ResponseWriter, _ *http.Request) bool {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	c := node(t, s)
	c.Registry.Credentials = filepath.Join(t.TempDir(), "config.json")
	login := base64.StdEncoding.EncodeToString([]byte("me:wrong-secret"))
	for name, tc := range map[string]struct{ file, want string }{
		"nobody": {`{}`, c.Registry.Credentials + " has no login for " + s.host()},
		"wrong":  {`{"auths": {"` + s.host() + `": {"auth": "` + login + `"}}}`, `the login of "me" for ` + s.host() + " in " + c.Registry.Credentials + " was refused"},
		"broken": {`{"auths": `, c.Registry.Credentials + " cannot be used, correct it: no JSON from byte 10 on"},
	} {
		if err := os.WriteFile(c.Registry.Credentials, []byte(tc.file), 0o600); err != nil {
			t.Fatal(err)
		}
		_, _, err := pull(t, c, Options{Ref: s.ref("v1")})
		if err == nil || strings.Count(err.Error(), tc.want) != 1 || strings.Contains(err.Error(), "wrong-secret") {
			t.Errorf("%s: got %v, want %q in it once", name, err, tc.want)
		}
	}
}

// TestGantrydGone has gantryd end during a pull, and come back before containerd has noticed.
func TestGantrydGone(t *testing.T) {
	t.Parallel()
	c := node(t)
	c.Address = filepath.Join(t.TempDir(), "gantry.sock")
	p, err := New(c, Options{Ref: "r.example/a:1"})
	if err != nil {
		t.Fatal(err)
	}
	reset := errors.New("dial unix " + c.Address + ": connection refused")
	if got := p.withoutGantryd(t.Context(), reset); !strings.Contains(got.Error(), "gantryd has ended, nobody answers at "+c.Address) {
		t.Errorf("got %v, want that gantryd has ended", got)
	}
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close() //nolint:errcheck // nothing was sent
	if got := p.withoutGantryd(t.Context(), reset); !strings.Contains(got.Error(), "pull again in some seconds") || !errors.Is(got, reset) {
		t.Errorf("got %v, want what to do", got)
	}
	other := errors.New("another")
	if got := p.withoutGantryd(t.Context(), other); got.Error() != other.Error() {
		t.Errorf("got %v, want it as it was", got)
	}
}
