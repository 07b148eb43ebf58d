package client

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	digest "github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/plugin/config"
)

func TestPullAndPullAgain(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	target, layers := s.image(t, "v1", 1, 3<<20, 700_000, 1)
	c := node(t, s)
	sum := mustPull(t, c, Options{Ref: s.ref("v1")})
	if sum.Digest != target.Digest || sum.Via != ViaTransfers || sum.Unpacked || sum.Folder != c.Transfer.Root {
		t.Errorf("got %+v, want digest %s, not unpacked, in %s", sum, target.Digest, c.Transfer.Root)
	}
	sent := s.take()
	for i, l := range sum.Layers {
		if l.Digest != layers[i].Digest || l.Phase != PhaseDone || l.Fetched != l.Size || l.Received != l.Size || sent[l.Digest] != l.Size {
			t.Errorf("layer %d: got %+v with %d bytes sent, want all of %+v fetched", i, l, sent[l.Digest], layers[i])
		}
		data, err := os.ReadFile(filepath.Join(c.Transfer.Root, "sha256-"+l.Digest.Encoded(), "data"))
		if err != nil || !bytes.Equal(data, s.documents[l.Digest.String()].data) {
			t.Errorf("layer %d on disk: %d bytes, %v; want the layer", i, len(data), err)
		}
	}
	if want := int64(3<<20 + 700_000 + 1); sum.Size != want || sum.Fetched != want || sum.Rate <= 0 {
		t.Errorf("got %d of %d bytes fetched at %f, want all of %d", sum.Fetched, sum.Size, sum.Rate, want)
	}

	again := mustPull(t, c, Options{Ref: s.ref("v1")})
	if sent := s.take(); len(sent) != 0 || again.Fetched != 0 {
		t.Errorf("the second pull fetched %d and was sent %v, want nothing", again.Fetched, sent)
	}
	for i, l := range again.Layers {
		if l.Phase != PhaseExists || l.Received != l.Size {
			t.Errorf("layer %d: got %+v, want it to exist", i, l)
		}
	}
}

// TestTwoPulls has one image pulled by two processes, or what the locks take for two.
func TestTwoPulls(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	_, layers := s.image(t, "v1", 2, 4<<20, 2<<20)
	c := node(t, s)
	hold := make(chan struct{})
	s.setFault(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/blobs/") {
			<-hold // the other one meets the locks
		}
		return false
	})
	locked := make(chan struct{}, 1)
	results := make(chan error, 2)
	for range 2 {
		p, err := New(c, Options{Ref: s.ref("v1"), Progress: func(s State) {
			for _, l := range s.Layers {
				if l.Phase == PhaseLock {
					select {
					case locked <- struct{}{}:
					default:
					}
				}
			}
		}})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := p.Run(t.Context())
			results <- err
		}()
	}
	select {
	case <-locked:
	case err := <-results:
		t.Fatalf("a pull ended (%v) before the other one met its locks", err)
	}
	close(hold)
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	sent := s.take()
	for i, l := range layers {
		if sent[l.Digest] != l.Size {
			t.Errorf("layer %d: %d bytes were sent, want %d", i, sent[l.Digest], l.Size)
		}
	}
}

// TestInterrupted ends a pull in the middle of a layer. The next one asks for the rest.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	_, layers := s.image(t, "v1", 3, 8<<20)
	c := node(t, s)
	c.Transfer.ChunkSize = 1 << 20
	c.Transfer.ConnectionsPerHost = 1
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("stopped by the test")
	s.setFault(func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.HasPrefix(r.Header.Get("Range"), "bytes=4194304-") {
			cancel(stopped)
			<-r.Context().Done()
			return true
		}
		return false
	})
	p, err := New(c, Options{Ref: s.ref("v1")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Run(ctx); !errors.Is(err, stopped) {
		t.Fatalf("got %v, want the cause of the context's end", err)
	}
	first := s.take()[layers[0].Digest]
	s.setFault(nil)
	sum := mustPull(t, c, Options{Ref: s.ref("v1")})
	second := s.take()[layers[0].Digest]
	if first == 0 || first+second != layers[0].Size {
		t.Errorf("%d bytes were sent before and %d after the interruption, want %d together", first, second, layers[0].Size)
	}
	if l := sum.Layers[0]; l.Phase != PhaseDone || l.Fetched != second {
		t.Errorf("got %+v, want %d bytes fetched", l, second)
	}
}

// TestProgressIsTold wants the layers in their order, and bytes that only grow.
func TestProgressIsTold(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	_, layers := s.image(t, "v1", 4, 1<<20, 1<<20)
	// The first layer once more: it is fetched and shown once.
	twice := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: s.putJSON(t, ocispec.MediaTypeImageConfig, 1), Layers: append(layers, layers[0])}
	s.tag("twice", s.putJSON(t, twice.MediaType, twice))
	_, states, err := pull(t, node(t, s), Options{Ref: s.ref("twice")})
	if err != nil {
		t.Fatal(err)
	}
	var last State
	for _, now := range states {
		if now.Name != s.ref("twice") || now.Via != ViaTransfers {
			t.Errorf("got %+v, want name and way in each state", now)
		}
		for i, l := range now.Layers {
			if len(now.Layers) != 2 || l.Digest != layers[i].Digest || len(last.Layers) > 0 && l.Received < last.Layers[i].Received {
				t.Errorf("got %+v after %+v", now.Layers, last.Layers)
			}
		}
		last = now
	}
	if len(states[0].Layers) != 0 || len(last.Layers) != 2 || last.Layers[1].Phase != PhaseDone {
		t.Errorf("got %+v at first and %+v at last, want no layers and all done", states[0], last)
	}
}

func TestPlatforms(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	want := map[string]digest.Digest{}
	for i, p := range []ocispec.Platform{
		{OS: "unknown", Architecture: "unknown"}, // an attestation
		{OS: "linux", Architecture: "amd64"}, {OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "arm", Variant: "v6"},
	} {
		desc, layers := s.image(t, "", uint64(10+i), 1000)
		desc.Platform = &p
		index.Manifests = append(index.Manifests, desc)
		want[p.OS+"/"+p.Architecture] = layers[0].Digest
	}
	target := s.putJSON(t, index.MediaType, index)
	s.tag("multi", target)
	c := node(t, s)
	for platform, want := range map[string]digest.Digest{
		"linux/amd64": want["linux/amd64"], "linux/arm64": want["linux/arm64"], "linux/arm/v7": want["linux/arm"], "amd64": want["linux/amd64"],
	} {
		sum := mustPull(t, c, Options{Ref: s.ref("multi"), Platform: platform})
		if len(sum.Layers) != 1 || sum.Layers[0].Digest != want || sum.Digest != target.Digest {
			t.Errorf("%s: got %+v, want layer %s", platform, sum, want)
		}
	}
	_, _, err := pull(t, c, Options{Ref: s.ref("multi"), Platform: "linux/s390x"})
	const text = "no image for platform linux/s390x, there is linux/amd64, linux/arm/v6, linux/arm64/v8 (choose with --platform)"
	if err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %q in it", err, text)
	}
	// By digest, a manifest is what it is.
	byDigest := s.host() + "/" + repo + "@" + index.Manifests[2].Digest.String()
	if sum := mustPull(t, c, Options{Ref: byDigest}); sum.Digest != index.Manifests[2].Digest || sum.Layers[0].Digest != want["linux/arm64"] {
		t.Errorf("got %+v, want the manifest asked for", sum)
	}
}

func TestBadImages(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	good, _ := s.image(t, "good", 20, 1000)
	s.tag("schema1", s.put(images.MediaTypeDockerSchema1Manifest, []byte(`{"schemaVersion":1}`)))
	s.tag("text", s.put("application/x-thing", []byte(`{}`)))
	// A layer whose bytes are others than its digest says, and one that is missing.
	_, layers := s.image(t, "rotten", 21, 2000)
	s.documents[layers[0].Digest.String()] = stored{"", bytes.Repeat([]byte("x"), 2000)}
	_, layers = s.image(t, "missing", 22, 2000)
	delete(s.documents, layers[0].Digest.String())
	// A manifest that changes between the look and the read.
	s.image(t, "forged", 23, 1000)
	s.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		d := s.documents["forged"]
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, digest.FromBytes(d.data).String()) {
			return false
		}
		w.Header().Set("Content-Type", d.mediaType)
		_, _ = w.Write(append([]byte(" "), d.data[1:]...))
		return true
	})
	c := node(t, s)
	for tag, want := range map[string]string{
		"schema1": "schema 1",
		"text":    `its media type is "application/x-thing"`,
		"rotten":  "no host has the right bytes",
		"missing": "not found",
		"forged":  "the registry sent something else",
		"absent":  "not found",
	} {
		_, _, err := pull(t, c, Options{Ref: s.ref(tag)})
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "image "+s.ref(tag)+": ") {
			t.Errorf("%s: got %v, want %q in it and the image", tag, err, want)
		}
	}
	if sum := mustPull(t, c, Options{Ref: s.ref("good")}); sum.Digest != good.Digest {
		t.Errorf("got %s, want %s", sum.Digest, good.Digest)
	}
}

// TestLogin pulls from a registry that wants to know who asks, for the manifest as for the layers.
func TestLogin(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	_, layers := s.image(t, "v1", 30, 100_000)
	s.setFault(func(w http.ResponseWriter, r *http.Request) bool {
		if user, secret, _ := r.BasicAuth(); user == "me" && secret == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	c := node(t, s)
	c.Registry.Credentials = filepath.Join(t.TempDir(), "config.json")
	if _, _, err := pull(t, c, Options{Ref: s.ref("v1")}); err == nil || len(s.take()) != 0 {
		t.Errorf("got %v without a login, want an error", err)
	}
	login := base64.StdEncoding.EncodeToString([]byte("me:secret"))
	if err := os.WriteFile(c.Registry.Credentials, []byte(`{"auths": {"`+s.host()+`": {"auth": "`+login+`"}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if sum := mustPull(t, c, Options{Ref: s.ref("v1")}); sum.Fetched != layers[0].Size {
		t.Errorf("got %+v, want it fetched", sum)
	}
}

func TestNotPermitted(t *testing.T) {
	t.Parallel()
	if os.Geteuid() == 0 {
		err := asRoot(&os.PathError{Op: "mkdir", Path: "/x", Err: os.ErrPermission})
		if err == nil || !strings.Contains(err.Error(), "run as root") {
			t.Errorf("got %v, want what to do", err)
		}
		return
	}
	c := config.Default()
	c.Transfer.Root = "/proc/1/transfers"
	if _, _, err := pull(t, c, Options{Ref: "alpine", NoContainerd: true}); err == nil || !strings.Contains(err.Error(), "run as root") {
		t.Errorf("got %v, want what to do", err)
	}
}
