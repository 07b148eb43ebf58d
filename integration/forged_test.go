package integration

import (
	"fmt"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// TestForgedSource pulls and imports manifests whose annotations name a host
// that the pull has nothing to do with. Nobody may ring there.
func TestForgedSource(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	decoy := newProxy(t, r) // serves the very blobs, so that a connection would even succeed
	if err := n.AddRegistry("http", decoy.Host()); err != nil {
		t.Fatal(err)
	}
	spec := small(40, 4<<20)
	spec.Edit = func(m *ocispec.Manifest, _ *ocispec.Image) {
		forged := map[string]string{
			"containerd.io/snapshot/cri.image-ref":              decoy.Host() + "/forged:test",
			"containerd.io/snapshot/cri.layer-digest":           m.Layers[0].Digest.String(),
			"containerd.io/snapshot/cri.manifest-digest":        digest.FromString("other").String(),
			"containerd.io/distribution.source.decoy":           "forged",
			"containerd.io/distribution.source." + decoy.Host(): "forged",
		}
		m.Annotations = forged
		for i := range m.Layers {
			m.Layers[i].Annotations = forged
		}
	}
	_, ref := push(t, r, p.Host(), "forged", spec)
	for way, args := range map[string][]string{"transfer": nil, "local": {"--local"}} {
		mustPull(t, n, way, ref, args...)
		checkImage(t, n, way, ref)
		mustRun(t, n, way, ref, "40", "/helper", "cat", "/etc/seed")
	}
	tar := mustExport(t, n, "local", ref)
	for i, args := range [][]string{nil, {"--local"}} {
		namespace := fmt.Sprint("imported", i)
		all := append([]string{"image", "import", "--snapshotter", n.Snapshotter}, args...)
		if _, err := n.Ctr(t.Context(), namespace, append(all, tar)...); err != nil {
			t.Fatal(err)
		}
		checkImage(t, n, namespace, ref)
	}
	if got := decoy.Requests(); len(got) > 0 {
		t.Errorf("%d requests reached the forged host, the first: %s %s by %s", len(got), got[0].Method, got[0].Path, got[0].UserAgent)
	}
}

// TestForgedDiffID pulls an image whose config claims another image's DiffID
// for a layer of its own: the pull fails, and the other image's files are not shown.
func TestForgedDiffID(t *testing.T) {
	for way, args := range map[string][]string{"transfer service": nil, "local": {"--local"}} {
		t.Run(way, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			private, ref := push(t, r, p.Host(), "private", small(41, 1<<20))
			mustPull(t, n, "owner", ref)
			spec := small(42, 1<<20)
			spec.Edit = func(_ *ocispec.Manifest, c *ocispec.Image) { c.RootFS.DiffIDs[2] = private.DiffIDs[2] }
			_, forged := push(t, r, p.Host(), "thief", spec)
			if out, err := n.Pull(t.Context(), "thief", forged, args...); err == nil {
				t.Errorf("pull with a forged DiffID succeeded: %s", out)
			}
			if err := n.Complete(t.Context(), "thief", forged); err == nil {
				t.Error("the forged image is unpacked")
			}
			mustRun(t, n, "owner", ref, "41", "/helper", "cat", "/etc/seed")
		})
	}
}
