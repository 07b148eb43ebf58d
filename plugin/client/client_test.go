package client

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"

	"github.com/gantryd/gantry/plugin/config"
)

func TestMain(m *testing.M) {
	// What goes wrong on purpose is not shown.
	if err := log.SetLevel("panic"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const repo = "library/thing"

// server is a registry of one repository that counts what it sends.
type server struct {
	*httptest.Server
	documents map[string]stored // manifests by tag and digest, blobs by digest

	mu    sync.Mutex
	sent  map[digest.Digest]int64 // bytes of each blob
	fault func(w http.ResponseWriter, r *http.Request) bool
}

type stored struct {
	mediaType string
	data      []byte
}

func newServer(t *testing.T) *server {
	t.Helper()
	s := &server{documents: map[string]stored{}, sent: map[digest.Digest]int64{}}
	s.Server = httptest.NewServer(s)
	t.Cleanup(s.Close)
	return s
}

func (s *server) host() string { return strings.TrimPrefix(s.URL, "http://") }

func (s *server) ref(tag string) string { return s.host() + "/" + repo + ":" + tag }

// ServeHTTP implements http.Handler.
func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	fault := s.fault
	s.mu.Unlock()
	if fault != nil && fault(w, r) {
		return
	}
	name, isManifest := strings.CutPrefix(r.URL.Path, "/v2/"+repo+"/manifests/")
	name, isBlob := strings.CutPrefix(name, "/v2/"+repo+"/blobs/")
	d, ok := s.documents[name]
	if !ok {
		w.WriteHeader(http.StatusNotFound)
		return
	}
	w.Header().Set("Content-Type", d.mediaType)
	if isManifest {
		w.Header().Set("Docker-Content-Digest", digest.FromBytes(d.data).String())
	}
	if isBlob && r.Method == http.MethodGet {
		w = &counted{w, s, digest.Digest(name)}
	}
	http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(d.data))
}

type counted struct {
	http.ResponseWriter
	server *server
	blob   digest.Digest
}

// Write implements io.Writer.
func (c *counted) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.server.mu.Lock()
	defer c.server.mu.Unlock()
	c.server.sent[c.blob] += int64(n)
	return n, err
}

// take returns what was sent of the blobs since the last call.
func (s *server) take() map[digest.Digest]int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	sent := s.sent
	s.sent = map[digest.Digest]int64{}
	return sent
}

func (s *server) setFault(f func(http.ResponseWriter, *http.Request) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fault = f
}

// blob stores bytes that look like nothing else.
func (s *server) blob(seed uint64, size int, mediaType string) ocispec.Descriptor {
	data := make([]byte, size)
	r := rand.New(rand.NewPCG(seed, 1))
	for i := range data {
		data[i] = byte(r.Uint32())
	}
	return s.put(mediaType, data)
}

func (s *server) put(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	s.documents[d.String()] = stored{mediaType, data}
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (s *server) putJSON(t *testing.T, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return s.put(mediaType, data)
}

// image stores an image with layers of these sizes under the tag; an empty tag is none.
func (s *server) image(t *testing.T, tag string, seed uint64, sizes ...int) (ocispec.Descriptor, []ocispec.Descriptor) {
	t.Helper()
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	m.Config = s.putJSON(t, ocispec.MediaTypeImageConfig, map[string]any{"os": "linux", "architecture": "amd64", "seed": seed})
	for i, size := range sizes {
		m.Layers = append(m.Layers, s.blob(seed<<8|uint64(i), size, ocispec.MediaTypeImageLayer))
	}
	desc := s.putJSON(t, m.MediaType, m)
	s.tag(tag, desc)
	return desc, m.Layers
}

func (s *server) tag(tag string, desc ocispec.Descriptor) {
	s.documents[tag] = s.documents[desc.Digest.String()]
}

// node is the configuration of a node without containerd that knows the servers.
func node(t *testing.T, servers ...*server) *config.Config {
	t.Helper()
	dir := t.TempDir()
	c := config.Default()
	c.Transfer.Root = filepath.Join(dir, "transfers")
	c.Containerd.Address = filepath.Join(dir, "absent.sock")
	c.Registry.ConfigPath = filepath.Join(dir, "certs.d")
	for _, s := range servers {
		folder := filepath.Join(c.Registry.ConfigPath, s.host())
		if err := os.MkdirAll(folder, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(folder, "hosts.toml"), []byte("server = "+strconv.Quote(s.URL)+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// pull pulls, and returns the states on the way as well.
func pull(t *testing.T, c *config.Config, o Options) (*Summary, []State, error) {
	t.Helper()
	var states []State
	o.Progress = func(s State) { states = append(states, s) }
	p, err := New(c, o)
	if err != nil {
		t.Fatal(err)
	}
	sum, err := p.Run(t.Context())
	return sum, states, err
}

func mustPull(t *testing.T, c *config.Config, o Options) *Summary {
	t.Helper()
	sum, _, err := pull(t, c, o)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

func TestNewRefuses(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		options Options
		want    string
	}{
		"no reference":       {Options{}, `image reference ""`},
		"upper case":         {Options{Ref: "Alpine"}, "must be lowercase"},
		"a URL":              {Options{Ref: "https://docker.io/alpine"}, `image reference "https://docker.io/alpine": invalid reference format; leave out https://`},
		"half a digest":      {Options{Ref: "alpine@sha256:12"}, "after @ stands a whole digest"},
		"a platform of four": {Options{Ref: "alpine", Platform: "a/b/c/d"}, `platform "a/b/c/d"`},
		"a path":             {Options{Ref: "alpine", Namespace: "../x"}, `namespace "../x"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := New(config.Default(), tc.options); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %q in it", err, tc.want)
			}
		})
	}
}

func TestReferences(t *testing.T) {
	t.Parallel()
	const d = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
	for ref, want := range map[string][2]string{
		"alpine":                         {"docker.io/library/alpine:latest", "docker.io/library/alpine@" + d},
		"docker.io/library/alpine:3":     {"docker.io/library/alpine:3", "docker.io/library/alpine@" + d},
		"localhost:5000/a/b":             {"localhost:5000/a/b:latest", "localhost:5000/a/b@" + d},
		"alpine@" + d:                    {"docker.io/library/alpine@" + d, "docker.io/library/alpine@" + d},
		"registry.k8s.io/pause:3.9@" + d: {"registry.k8s.io/pause@" + d, "registry.k8s.io/pause@" + d},
	} {
		p, err := New(config.Default(), Options{Ref: ref})
		if err != nil {
			t.Fatal(err)
		}
		s := p.state(ViaTransfers)
		s.Digest = d
		if got := [2]string{s.Name, s.Canonical()}; got != want {
			t.Errorf("%s: got %v, want %v", ref, got, want)
		}
	}
}

// TestFolder holds the folder against the one where gantryd looks.
func TestFolder(t *testing.T) {
	t.Parallel()
	c := config.Default()
	for policy, want := range map[string]string{
		config.PolicyShared:   "/var/lib/gantry/transfers",
		config.PolicyIsolated: "/var/lib/gantry/transfers/namespaces/k8s.io",
	} {
		c.Containerd.ContentSharingPolicy = policy
		p, err := New(c, Options{Ref: "alpine", Namespace: "k8s.io"})
		if err != nil {
			t.Fatal(err)
		}
		if got := p.Folder(); got != want {
			t.Errorf("%s: got %s, want %s", policy, got, want)
		}
	}
}
