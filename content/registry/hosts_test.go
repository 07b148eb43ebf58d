package registry

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// caFile writes the certificate of a TLS test server.
func caFile(t *testing.T, h *host) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ca.pem")
	write(t, name, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.Certificate().Raw})))
	return name
}

func hostsOf(s []*Source) []string {
	var out []string
	for _, x := range s {
		out = append(out, x.url.String())
	}
	return out
}

func TestSources(t *testing.T) {
	t.Parallel()
	blobs := "/library/thing/blobs/" + blobDigest.String()
	for _, c := range []struct {
		name, folder, toml, host string
		want                     []string
	}{
		{"nothing configured", "other.example", "", "images.example", []string{"https://images.example/v2" + blobs}},
		{"docker.io", "other.example", "", "docker.io", []string{"https://registry-1.docker.io/v2" + blobs}},
		{"localhost without a port", "other.example", "", "localhost", []string{"https://localhost/v2" + blobs}},
		{"localhost with port 80", "other.example", "", "localhost:80", []string{"http://localhost:80/v2" + blobs}},
		{"IPv6", "other.example", "", "[::1]:5000", []string{"https://[::1]:5000/v2" + blobs}},
		{"plain http by hosts.toml", "images.example", `server = "http://images.example"`, "images.example", []string{"http://images.example/v2" + blobs}},
		{"mirrors in order, capabilities", "docker.io", `
server = "https://registry-1.docker.io"
[host."https://z.example"]
[host."http://push.example"]
  capabilities = ["push"]
[host."https://a.example:5000/proxy"]
  capabilities = ["pull"]
[host."https://b.example/some/api"]
  override_path = true
`, "docker.io", []string{
			"https://z.example/v2" + blobs + "?ns=docker.io",
			"https://a.example:5000/proxy/v2" + blobs + "?ns=docker.io",
			"https://b.example/some/api" + blobs + "?ns=docker.io",
			"https://registry-1.docker.io/v2" + blobs,
		}},
		{"mirrors before the host itself", "images.example", "[host.\"https://m.example\"]\n", "images.example",
			[]string{"https://m.example/v2" + blobs + "?ns=images.example", "https://images.example/v2" + blobs}},
		{"folder with a port", "images.example_5000_", "[host.\"https://m.example\"]\n", "images.example:5000",
			[]string{"https://m.example/v2" + blobs + "?ns=images.example%3A5000", "https://images.example:5000/v2" + blobs}},
		{"_default", "_default", "[host.\"https://m.example\"]\n", "images.example",
			[]string{"https://m.example/v2" + blobs + "?ns=images.example", "https://images.example/v2" + blobs}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := newRegistry(t, Options{ConfigPath: certs(t, c.folder, c.toml)})
			if got := hostsOf(sources(t, r, c.host)); !slices.Equal(got, c.want) {
				t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(c.want, "\n"))
			}
		})
	}
}

func TestNoHostMayServe(t *testing.T) {
	t.Parallel()
	r := newRegistry(t, Options{ConfigPath: certs(t, "images.example", "server = \"https://images.example\"\ncapabilities = [\"push\"]\n")})
	if _, err := r.Sources(t.Context(), "images.example", repo, blobDigest, 1); !errdefs.IsNotFound(err) {
		t.Errorf("error %v", err)
	}
}

func TestNamesAreChecked(t *testing.T) {
	t.Parallel()
	r := newRegistry(t, Options{ConfigPath: t.TempDir()})
	for _, c := range [][2]string{
		{"", repo}, {"..", repo}, {"../etc", repo}, {"a b", repo}, {"a/b", repo}, {"user@host", repo}, {"host:", repo}, {"host:x", repo}, {"host?x", repo}, {"host#", repo},
		{"host\r\nX: y", repo}, {"_default", repo}, {"[::1", repo}, {"host%00", repo}, {strings.Repeat("a", 300), repo}, {"host\n", repo},
		{"images.example", ""}, {"images.example", "../../v1"}, {"images.example", "a/../b"}, {"images.example", "/a"}, {"images.example", "a/"}, {"images.example", "a//b"},
		{"images.example", "A"}, {"images.example", "a?b"}, {"images.example", "a:tag"}, {"images.example", "a@sha256:x"}, {"images.example", "a b"}, {"images.example", "a%2fb"},
		{"images.example", "a\nb"}, {"images.example", "a,push"}, {"images.example", strings.Repeat("a/", 200) + "a"}, {"images.example", "ä"},
	} {
		if _, err := r.Sources(t.Context(), c[0], c[1], blobDigest, 1); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q %q: %v", c[0], c[1], err)
		}
	}
	for _, d := range []digest.Digest{"", "sha256:", "sha256:abc", "md5:d41d8cd98f00b204e9800998ecf8427e", "sha256:../../../../../etc/passwd"} {
		if _, err := r.Sources(t.Context(), "images.example", repo, d, 1); !errdefs.IsInvalidArgument(err) {
			t.Errorf("digest %q: %v", d, err)
		}
	}
	if _, err := r.Sources(t.Context(), "images.example", repo, blobDigest, -1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("size: %v", err)
	}
}

func TestBadHostsFiles(t *testing.T) {
	t.Parallel()
	for name, toml := range map[string]string{
		"syntax":        "server = [\n",
		"type":          "server = 5\n",
		"capability":    `capabilities = ["fly"]`,
		"duration":      `dial_timeout = "soon"`,
		"zero duration": `dial_timeout = "0s"`,
		"ca type":       `ca = 5`,
		"ca missing":    `ca = "missing.pem"`,
		"client triple": `client = [["a", "b", "c"]]`,
		"header type":   "[header]\nx = 5\n",
		"header name":   "[header]\n\"x y\" = \"z\"\n",
		"header value":  "[header]\nx = \"a\\r\\nb: c\"\n",
		"scheme":        "[host.\"httpx://a\"]\n",
		"no host":       "[host.\"https://\"]\n",
		"password":      "[host.\"https://u:p@a\"]\n",
		"url":           "server = \"https://%zz\"\n",
		"header in one": "[host.\"https://a\".header]\nx = [5]\n",
		"random bytes":  "\x00\xff\xfe",
		"very long":     strings.Repeat("# comment\n", 200_000),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := certs(t, "images.example", toml)
			_, err := newRegistry(t, Options{ConfigPath: root}).Sources(t.Context(), "images.example", repo, blobDigest, 1)
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("error %v", err)
			}
			contains(t, err, filepath.Join(root, "images.example"))
			if name == "password" && strings.Contains(err.Error(), ":p@") {
				t.Errorf("the password is in the error: %v", err)
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		t.Parallel()
		root := t.TempDir()
		if err := os.MkdirAll(filepath.Join(root, "images.example", "hosts.toml"), 0o755); err != nil {
			t.Fatal(err)
		}
		_, err := newRegistry(t, Options{ConfigPath: root}).Sources(t.Context(), "images.example", repo, blobDigest, 1)
		if !errdefs.IsFailedPrecondition(err) {
			t.Errorf("error %v", err)
		}
	})
}

func TestHostsFilesAreReadAgain(t *testing.T) {
	t.Parallel()
	root := certs(t, "images.example", "[host.\"https://one.example\"]\n")
	r := newRegistry(t, Options{ConfigPath: root})
	first := sources(t, r, "images.example")
	if again := sources(t, r, "images.example"); again[0].ep != first[0].ep {
		t.Error("connections are not shared while nothing changes")
	}
	addHosts(t, root, "images.example", "[host.\"https://two.example:5000\"]\n")
	if got := sources(t, r, "images.example")[0].Host(); got != "two.example:5000" {
		t.Errorf("after a change: %s", got)
	}
	addHosts(t, root, "images.example", "oops")
	if _, err := r.Sources(t.Context(), "images.example", repo, blobDigest, 1); err == nil {
		t.Error("a file that went bad is not noticed")
	}
	if err := os.RemoveAll(filepath.Join(root, "images.example")); err != nil {
		t.Fatal(err)
	}
	if got := sources(t, r, "images.example")[0].Host(); got != "images.example" {
		t.Errorf("after removal: %s", got)
	}
}

func TestSeveralRootsAndBoundedMemory(t *testing.T) {
	t.Parallel()
	a := certs(t, "a.example", "server = \"https://first.example\"\n")
	b := certs(t, "a.example", "server = \"https://second.example\"\n")
	addHosts(t, b, "b.example", "server = \"https://only.example\"\n")
	r := newRegistry(t, Options{ConfigPath: strings.Join([]string{a, "/does/not/exist", b}, ":")})
	for host, want := range map[string]string{"a.example": "first.example", "b.example": "only.example"} {
		if got := sources(t, r, host)[0].Host(); got != want {
			t.Errorf("%s: %s, want %s", host, got, want)
		}
	}
	for i := range 3 * maxHostSets {
		sources(t, r, fmt.Sprintf("h%d.example", i))
	}
	if n := len(r.hosts); n > maxHostSets {
		t.Errorf("%d hosts are kept", n)
	}
}

func TestHostsFor(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	for _, f := range []string{"images.example", "images.example:5000", "images.example_443_", "images.example_5000_", "images.example_x_", "images.example:0", "images.example:99999",
		"images.example.org:1", "other.example:2", "images.example_7", "[::1]:5000", "[::1]_6000_"} {
		if err := os.Mkdir(filepath.Join(root, f), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	r := newRegistry(t, Options{ConfigPath: root + ":/does/not/exist"})
	for host, want := range map[string][]string{
		"images.example": {"images.example", "images.example:443", "images.example:5000"},
		"nobody.example": {"nobody.example"},
		"::1":            {"[::1]", "[::1]:5000", "[::1]:6000"},
		"../x":           nil,
		"":               nil,
	} {
		if got := r.HostsFor(host); !slices.Equal(got, want) {
			t.Errorf("%q: %v, want %v", host, got, want)
		}
	}
}

func TestTLS(t *testing.T) {
	t.Parallel()
	h := startTLS(t, serve)
	for _, c := range []struct {
		name, toml string
		is         func(error) bool
	}{
		{"own CA", fmt.Sprintf("ca = %q", caFile(t, h)), nil},
		{"skip_verify", "skip_verify = true", nil},
		{"CA and a dial timeout", fmt.Sprintf("ca = [%q]\ndial_timeout = \"2s\"", caFile(t, h)), nil},
		{"nobody vouches", "", errdefs.IsFailedPrecondition},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			root := certs(t, "images.example", fmt.Sprintf("server = %q\n%s\n", h.URL, c.toml))
			s := only(t, newRegistry(t, Options{ConfigPath: root}), "images.example")
			if c.is == nil {
				parallel(t, s)
				return
			}
			if _, err := s.Open(t.Context(), 0, 10); !c.is(err) {
				t.Errorf("error %v", err)
			}
		})
	}
	t.Run("docker's layout", func(t *testing.T) {
		t.Parallel()
		// Not on localhost's terms (any certificate goes there), so under a name of its own.
		root := t.TempDir()
		pem, err := os.ReadFile(caFile(t, h))
		if err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(root, strings.ReplaceAll(h.addr(), ":", "_")+"_", "ca.crt"), string(pem))
		mustFetch(t, only(t, newRegistry(t, Options{ConfigPath: root}), h.addr()), 0, 100)
	})
	t.Run("TLS asked of a plain port", func(t *testing.T) {
		t.Parallel()
		plain := start(t, serve)
		root := certs(t, "images.example", fmt.Sprintf("server = %q", "https://"+plain.addr()))
		_, err := only(t, newRegistry(t, Options{ConfigPath: root}), "images.example").Open(t.Context(), 0, 10)
		if !errdefs.IsFailedPrecondition(err) || len(plain.requests()) != 0 {
			t.Errorf("%v, %d requests in the clear", err, len(plain.requests()))
		}
	})
}

// TestClientCertificate logs in by certificate, in both forms of hosts.toml.
func TestClientCertificate(t *testing.T) {
	t.Parallel()
	h := newHost(t, serve, func(s *httptest.Server) {
		s.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert, MinVersion: tls.VersionTLS12}
		s.StartTLS()
	})
	pair := h.TLS.Certificates[0] // any will do
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]})
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	for name, client := range map[string]string{"pair": `client = [["c.pem", "k.pem"]]`, "one file": `client = "both.pem"`, "none": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			root := certs(t, "images.example", fmt.Sprintf("server = %q\nca = %q\n%s\n", h.URL, caFile(t, h), client))
			dir := filepath.Join(root, "images.example")
			write(t, filepath.Join(dir, "c.pem"), string(cert))
			write(t, filepath.Join(dir, "k.pem"), string(key))
			write(t, filepath.Join(dir, "both.pem"), string(cert)+string(key))
			got, err := fetch(t.Context(), only(t, newRegistry(t, Options{ConfigPath: root}), "images.example"), 0, 10)
			if client != "" && (err != nil || len(got) != 10) || client == "" && !errdefs.IsUnavailable(err) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
		})
	}
}

// TestMirrorsOverTLS goes through two mirrors, of which one wants a client
// certificate, past a host that takes no pulls, to the server.
func TestMirrorsOverTLS(t *testing.T) {
	t.Parallel()
	asking := func(a tls.ClientAuthType) *host {
		return newHost(t, serve, func(s *httptest.Server) {
			s.TLS = &tls.Config{ClientAuth: a, MinVersion: tls.VersionTLS12}
			s.StartTLS()
		})
	}
	strict, second, origin := asking(tls.RequireAnyClientCert), asking(tls.RequestClientCert), asking(tls.RequestClientCert)
	pushes := startTLS(t, serve)
	root := certs(t, "images.example", fmt.Sprintf(`
server = %[1]q
ca = "ca.pem"
[host.%[2]q]
  capabilities = ["push"]
  skip_verify = true
[host.%[3]q]
  capabilities = ["pull"]
  ca = "ca.pem"
  client = [["c.pem", "k.pem"]]
  override_path = true
  [host.%[3]q.header]
    x-key = ["a", "b"]
[host.%[4]q]
  capabilities = ["pull", "resolve"]
  ca = ["ca.pem"]
  dial_timeout = "3s"
`, origin.URL, pushes.URL, strict.URL+"/api", second.URL))
	dir := filepath.Join(root, "images.example")
	pair := strict.TLS.Certificates[0]
	der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	cert := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: pair.Certificate[0]}))
	write(t, filepath.Join(dir, "ca.pem"), cert) // httptest's servers all have the same
	write(t, filepath.Join(dir, "c.pem"), cert)
	write(t, filepath.Join(dir, "k.pem"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
	s := sources(t, newRegistry(t, Options{ConfigPath: root}), "images.example")
	var tiers []int
	for _, x := range s {
		parallel(t, x)
		mustFetch(t, x, 50, 100)
		tiers = append(tiers, x.Tier())
	}
	if !slices.Equal(tiers, []int{0, 0, 1}) || s[0].Host() != strict.addr()+"/api" || s[1].Host() != second.addr() || s[2].Host() != origin.addr() {
		t.Errorf("tiers %v of %v", tiers, hostsOf(s))
	}
	q := strict.requests()[0]
	if len(q.TLS.PeerCertificates) != 1 || !slices.Equal(q.Header.Values("X-Key"), []string{"a", "b"}) || !strings.HasPrefix(q.URL.Path, "/api/"+repo+"/blobs/") {
		t.Errorf("asked %s with %v", q.URL, q.Header)
	}
	for _, h := range []*host{second, origin} {
		if q := h.requests()[0]; len(q.TLS.PeerCertificates) != 0 || q.Header.Get("X-Key") != "" {
			t.Errorf("%s was shown what is another's: %v", q.Host, q.Header)
		}
	}
	if len(pushes.requests()) != 0 {
		t.Error("a host without the capability was asked")
	}
}

// TestMirrorAndOverride fetches through real servers, in order.
func TestMirrorAndOverride(t *testing.T) {
	t.Parallel()
	mirror, origin := start(t, serve), start(t, serve)
	root := certs(t, "images.example", fmt.Sprintf("server = %q\n[host.%q]\n  override_path = true\n  dial_timeout = \"1s\"\n  [host.%q.header]\n    user-agent = \"special\"\n",
		origin.URL, mirror.URL+"/own/api", mirror.URL+"/own/api"))
	s := sources(t, newRegistry(t, Options{ConfigPath: root, DialTimeout: time.Second}), "images.example")
	if len(s) != 2 || s[0].Host() != mirror.addr()+"/own/api" || s[1].Host() != origin.addr() {
		t.Fatalf("sources %v", hostsOf(s))
	}
	if s[0].Tier() != 0 || s[1].Tier() != 1 {
		t.Errorf("tiers %d and %d, want the mirror before the server", s[0].Tier(), s[1].Tier())
	}
	for _, x := range s {
		mustFetch(t, x, 50, 100)
	}
	if r := mirror.requests()[0]; r.URL.Path != "/own/api/"+repo+"/blobs/"+blobDigest.String() || r.UserAgent() != "special" {
		t.Errorf("mirror was asked for %s by %s", r.URL, r.UserAgent())
	}
}

func FuzzHostsFile(f *testing.F) {
	f.Add("server = \"https://a\"\n[host.\"http://b\"]\ncapabilities=[\"pull\"]\n[host.\"http://b\".header]\nx=[\"y\"]\n")
	f.Add("ca=[[1]]")
	f.Add("host=5")
	f.Add("[host.\"\"]")
	f.Add("server=\"http\"")
	f.Fuzz(func(t *testing.T, toml string) {
		r := New(Options{ConfigPath: certs(t, "images.example", toml)})
		sources, err := r.Sources(t.Context(), "images.example", repo, blobDigest, 1)
		if err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
			t.Fatal(err)
		}
		for _, s := range sources {
			if s.Host() == "" || s.url.Host == "" {
				t.Fatalf("source without a host: %s", s.url)
			}
		}
	})
}
