package integration

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// What the transfers must stand. "Sent" is what the registry wrote to its sockets, headers and what the
// kernel's buffers still held included; a connection gets 25 MB/s unless a test says otherwise, so that little waits there.
const perConnection = 25_000_000

// newFaultRegistry starts a registry that ends with the test.
func newFaultRegistry(t *testing.T, o harness.FaultOptions) *harness.FaultRegistry {
	t.Helper()
	if o.PerConnection == 0 {
		o.PerConnection = perConnection
	}
	f, err := harness.StartFaultRegistry(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Errorf("close registry: %v", err)
		}
	})
	return f
}

// newFaultyNode starts a node that knows the registries speak plain HTTP.
func newFaultyNode(t *testing.T, o harness.Options, registries ...*harness.FaultRegistry) *harness.Node {
	t.Helper()
	needGantry(t)
	n := newNode(t, o)
	for _, f := range registries {
		if err := n.AddRegistry("http", f.Host()); err != nil {
			t.Fatal(err)
		}
	}
	return n
}

// faulty is what most of these tests need: a registry that has the image, and a node that can reach it.
func faulty(t *testing.T, im *harness.Image, o harness.FaultOptions, node harness.Options) (f *harness.FaultRegistry, n *harness.Node, ref string) {
	t.Helper()
	f = newFaultRegistry(t, o)
	return f, newFaultyNode(t, node, f), f.AddImage(im, "faulty/image", "test")
}

// random is an image of uncompressed layers of so many MiB in which no two pages are the same. It costs little to make.
func random(t *testing.T, seed uint64, layers ...int64) *harness.Image {
	t.Helper()
	var spec harness.ImageSpec
	for i, mib := range layers {
		spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: pages(seed<<8+uint64(i), mib<<20), Compression: harness.Uncompressed})
	}
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), spec)
	if err != nil {
		t.Fatal(err)
	}
	return im
}

// pages writes one file, a random MiB over and over with a number in each of its pages.
func pages(seed uint64, size int64) harness.TarFunc {
	return func(w io.Writer) error {
		tw := tar.NewWriter(w)
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint("pages", seed), Mode: 0o644, Size: size, ModTime: harness.Epoch}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		buf := make([]byte, 1<<20)
		src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
		if _, err := src.Read(buf); err != nil {
			return err
		}
		for page := int64(0); page < size; {
			for at := 0; at < len(buf); at, page = at+4096, page+4096 {
				copy(buf[at:], fmt.Sprintf("%016x", page))
			}
			if _, err := tw.Write(buf); err != nil {
				return err
			}
		}
		return tw.Close()
	}
}

// all is how many bytes an image has: layers, config and manifest.
func all(im *harness.Image) int64 { return im.Size() + im.Config.Size + im.Manifest.Size }

// checkSent wants no more to have left the registry than the limit allows, as a multiple of the image's bytes.
func checkSent(t *testing.T, f *harness.FaultRegistry, im *harness.Image, limit float64) {
	t.Helper()
	sent, body := float64(f.Sent()), int64(0)
	var each []string
	for _, l := range im.Layers {
		n := f.SentBlob(l.Digest)
		body += n
		each = append(each, fmt.Sprintf("%.3f", float64(n)/float64(l.Size)))
	}
	t.Logf("sent %.4f x the image's %d bytes (layers' bodies alone %.4f x: %s), in %d requests",
		sent/float64(all(im)), all(im), float64(body)/float64(im.Size()), strings.Join(each, ", "), len(f.Requests()))
	if sent > limit*float64(all(im)) {
		t.Errorf("%.0f bytes were sent, %.4f x the image's %d, want at most %.2f x", sent, sent/float64(all(im)), all(im), limit)
	}
}

// checkFiles wants blobs and layer files to hash to their names.
func checkFiles(t *testing.T, n *harness.Node, im *harness.Image) {
	t.Helper()
	for i, l := range im.Layers {
		checkHash(t, filepath.Join(n.Dir, "gantry", "content", "blobs", "sha256", l.Digest.Encoded()))
		checkHash(t, filepath.Join(n.Dir, "gantry", "layers", "sha256", im.DiffIDs[i].Encoded()))
	}
}

func checkHash(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		t.Error(err)
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != filepath.Base(path) {
		t.Errorf("%s has the SHA-256 %s", path, got)
	}
}

// checkWhole is checkImage and checkFiles: what containerd believes, and what the disk has.
func checkWhole(t *testing.T, n *harness.Node, namespace, ref string, im *harness.Image) {
	t.Helper()
	checkImage(t, n, namespace, ref)
	checkFiles(t, n, im)
}

// checkFetcher wants containerd to have been sent no byte of a layer.
func checkFetcher(t *testing.T, f *harness.FaultRegistry, im *harness.Image) {
	t.Helper()
	for i, l := range im.Layers {
		if sent := f.BlobBytes()[l.Digest]; sent["containerd"] != 0 || sent[harness.Gantry] < l.Size {
			t.Errorf("layer %d of %d bytes was sent as %v, want all of it to gantry", i, l.Size, sent)
		}
	}
}

// layersOnly applies the rule to what gantry asks of the image's layers.
func layersOnly(im *harness.Image, rule harness.Rule) harness.Rule {
	return func(r *http.Request) *harness.Fault {
		if !fromGantry(r) || !slices.ContainsFunc(im.Layers, func(l ocispec.Descriptor) bool { return isOf(r, l.Digest) }) {
			return nil
		}
		return rule(r)
	}
}

func isOf(r *http.Request, dgst digest.Digest) bool {
	return strings.HasSuffix(r.URL.Path, "/blobs/"+dgst.String())
}

// checkLog wants a line of gantryd's log that has all the words.
func checkLog(t *testing.T, n *harness.Node, words ...string) {
	t.Helper()
	data, err := os.ReadFile(n.Gantryd().Log())
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(line, w) }) {
			t.Logf("the log says: %s", strings.TrimSpace(line))
			return
		}
	}
	t.Errorf("no line of gantryd's log has %q", words)
}

// TestCutConnections resets connections every 4 MB on average and answers one request in ten with 503.
func TestCutConnections(t *testing.T) {
	im := random(t, 1, 100, 100)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	var mu sync.Mutex
	chance := rand.New(rand.NewPCG(4, 4))
	var refused, cut int
	f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault {
		mu.Lock()
		defer mu.Unlock()
		if chance.Float64() < 0.1 {
			refused++
			return &harness.Fault{Status: http.StatusServiceUnavailable}
		}
		// An exponential distribution has no memory: however the requests divide the blob, this is once in 4 MB.
		cut++
		return &harness.Fault{ResetAfter: 1 + int64(chance.ExpFloat64()*4e6)}
	}))
	mustPull(t, n, "default", ref)
	checkWhole(t, n, "default", ref, im)
	t.Logf("%d requests were refused, %d could be cut", refused, cut)
	if refused < 3 || cut < 20 {
		t.Error("hardly anything went wrong")
	}
	checkFetcher(t, f, im)
	checkSent(t, f, im, 1.02)
}

// until polls until done. The end of the pull before that is a failure.
func until(t *testing.T, pulled <-chan error, done func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(2 * time.Minute)
	for !done() {
		select {
		case err := <-pulled:
			t.Fatalf("the pull ended too early (%v)", err)
		case <-timeout:
			t.Fatal("waited for two minutes")
		case <-tick.C:
		}
	}
}
