package integration

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// cutTo keeps the first part of a blob.
func cutTo(numerator, denominator int64) func(f *os.File) error {
	return func(f *os.File) error {
		info, err := f.Stat()
		if err != nil {
			return err
		}
		return f.Truncate(info.Size() * numerator / denominator)
	}
}

// flip changes one byte in the middle of a blob.
func flip(f *os.File) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	p, at := make([]byte, 1), info.Size()/2
	if _, err := f.ReadAt(p, at); err != nil {
		return err
	}
	_, err = f.WriteAt([]byte{^p[0]}, at)
	return err
}

// shortTar ends in the middle of a member's content.
func shortTar(w io.Writer) error {
	var b bytes.Buffer
	if err := harness.Noise("n", 50, 1<<20, 2)(&b); err != nil {
		return err
	}
	_, err := w.Write(b.Bytes()[:700<<10])
	return err
}

// notTar is text: gunzips well, and is no tar.
func notTar(w io.Writer) error {
	_, err := io.WriteString(w, strings.Repeat("this is not a tar archive\n", 4096))
	return err
}

// TestBadInput pulls images that are broken in one way each. The pull fails and
// says why; nothing of it is visible; a good image works right after.
func TestBadInput(t *testing.T) {
	broken := func(change func(l *harness.LayerSpec)) func(seed uint64) harness.ImageSpec {
		return func(seed uint64) harness.ImageSpec {
			s := small(seed, 2<<20)
			change(&s.Layers[2])
			return s
		}
	}
	tarOf := func(tar harness.TarFunc) func(seed uint64) harness.ImageSpec {
		return broken(func(l *harness.LayerSpec) { l.Tar = tar })
	}
	lying := func(edit func(m *ocispec.Manifest, c *ocispec.Image)) func(seed uint64) harness.ImageSpec {
		return func(seed uint64) harness.ImageSpec {
			s := small(seed, 2<<20)
			s.Edit = edit
			return s
		}
	}
	cases := []struct {
		name    string
		spec    func(seed uint64) harness.ImageSpec
		corrupt bool // bytes change on their way
	}{
		{name: "truncated gzip", spec: broken(func(l *harness.LayerSpec) { l.Mangle = cutTo(2, 3) })},
		{name: "corrupt gzip", spec: broken(func(l *harness.LayerSpec) { l.Mangle = flip })},
		{name: "truncated zstd", spec: broken(func(l *harness.LayerSpec) { l.Compression, l.Mangle = harness.Zstd, cutTo(2, 3) })},
		{name: "tar ends early", spec: tarOf(shortTar)},
		{name: "not a tar", spec: tarOf(notTar)},
		{name: "hard link to nothing", spec: tarOf(harness.Entries(hardLink("link", "nowhere")))},
		{name: "hard link into a lower layer", spec: tarOf(harness.Entries(hardLink("link", "etc/seed")))},
		{name: "DiffID of something else", spec: lying(func(_ *ocispec.Manifest, c *ocispec.Image) {
			c.RootFS.DiffIDs[2] = digest.FromString("something else")
		})},
		{name: "size too large", spec: lying(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[2].Size += 1000 })},
		{name: "size too small", spec: lying(func(m *ocispec.Manifest, _ *ocispec.Image) { m.Layers[2].Size -= 1000 })},
		{name: "digest does not match", spec: func(seed uint64) harness.ImageSpec { return small(seed, 2<<20) }, corrupt: true},
	}
	n, r, p := setup(t, harness.Options{})
	seed := uint64(50)
	for _, c := range cases {
		for way, args := range map[string][]string{"transfer service": nil, "local": {"--local"}} {
			t.Run(c.name+", "+way, func(t *testing.T) {
				seed += 2 // a blob that an earlier case left in the store would hide the fault
				im, ref := push(t, r, p.Host(), fmt.Sprint("bad", seed), c.spec(seed))
				bad := im.Layers[2]
				if c.corrupt {
					p.SetRule(corruptBlob(bad.Digest))
					defer p.SetRule(nil)
				}
				out, err := n.Pull(t.Context(), "default", ref, args...)
				if err == nil {
					t.Fatalf("the pull succeeded: %s", out)
				}
				t.Logf("says: %s", says(err.Error()))
				if snapshotter == harness.Gantry {
					checkMessage(t, err.Error(), ref, bad, im.DiffIDs[2])
				}
				if n.Complete(t.Context(), "default", ref) == nil {
					t.Error("the broken image is complete and unpacked")
				}
				p.SetRule(nil)
				_, good := push(t, r, p.Host(), "good", small(seed+1, 1<<20))
				// ctr --local builds on lower layers that the failed pull left and holds no lease of them: containerd's
				// collector is to have taken them before.
				if err := n.CollectGarbage(t.Context()); err != nil {
					t.Fatal(err)
				}
				mustPull(t, n, "default", good, args...)
				checkImage(t, n, "default", good)
			})
		}
	}
}

func hardLink(name, target string) harness.Entry {
	e := harness.File(name, "")
	e.Typeflag, e.Linkname = '1', target
	return e
}

func corruptBlob(dgst digest.Digest) harness.Rule {
	return func(r *http.Request) *harness.Fault {
		if !strings.HasSuffix(r.URL.Path, dgst.String()) {
			return nil
		}
		return &harness.Fault{Corrupt: harness.Flip(1000)}
	}
}

// says returns what ctr itself says at the end, without the log and progress lines before it.
func says(message string) string {
	if i := strings.LastIndex(message, "\nctr: "); i >= 0 {
		message = message[i+1:]
	}
	return strings.TrimSpace(message)
}

// checkMessage wants what ctr says, which is what a pod's events show, to be one line and to name image
// and layer, the layer by its blob or its DiffID.
func checkMessage(t *testing.T, message, ref string, layer ocispec.Descriptor, diffID digest.Digest) {
	t.Helper()
	// containerd repeats the error of one layer for each that waited with it.
	line, _, _ := strings.Cut(says(message), "\n")
	if !strings.Contains(line, layer.Digest.Encoded()) && !strings.Contains(line, diffID.Encoded()) {
		t.Errorf("the message does not name layer %s: %s", layer.Digest, line)
	}
	// A pull by the client itself tells gantryd the repository, not the tag.
	if repository := strings.TrimSuffix(ref, ":test"); !strings.Contains(line, repository) {
		t.Errorf("the message does not name image %s: %s", ref, line)
	}
}

// TestFullDisk pulls what does not fit onto a small file system: the pull says
// so, a container goes on, and a small image can be pulled when there is room again.
func TestFullDisk(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	n := newNode(t, harness.Options{DiskMiB: 96})
	if err := n.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	_, fits := push(t, r, r.Host(), "fits", small(70, 2<<20))
	_, large := push(t, r, r.Host(), "large", small(71, 200<<20))
	mustPull(t, n, "default", fits)
	if err := n.RunDetached(t.Context(), "default", fits, "steady", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	sum := mustExec(t, n, "steady", "/helper", "sum", "/noise")
	_, err := n.Pull(t.Context(), "default", large)
	if err == nil {
		t.Fatal("200 MiB fitted onto 96")
	}
	if !strings.Contains(err.Error(), "no space left on device") {
		t.Errorf("the message does not say that the disk is full: %s", says(err.Error()))
	}
	if got := mustExec(t, n, "steady", "/helper", "sum", "/noise"); got != sum {
		t.Errorf("the container reads %s, want %s", got, sum)
	}
	if n.Complete(t.Context(), "default", large) == nil {
		t.Error("the image that did not fit is complete")
	}
}
