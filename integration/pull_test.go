package integration

import (
	"net/http"
	"strings"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// TestPull holds the whole path together: what the registry saw, what is in
// the store afterwards, what runs, and that the image can leave again.
func TestPull(t *testing.T) {
	for name, args := range map[string][]string{"transfer service": nil, "local": {"--local"}} {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			im, ref := push(t, r, p.Host(), "pull", small(1, 8<<20))
			mustPull(t, n, "default", ref, args...)
			checkRegistryLog(t, r, im)
			checkImage(t, n, "default", ref)
			mustRun(t, n, "default", ref, "1", "/helper", "cat", "/etc/link")
			checkLeaves(t, n, r, ref)
		})
	}
}

// checkRegistryLog wants every layer sent once, to gantry alone, and containerd to have asked for the rest.
func checkRegistryLog(t *testing.T, r *harness.Registry, im *harness.Image) {
	t.Helper()
	log, err := r.Accesses()
	if err != nil {
		t.Fatal(err)
	}
	sent := map[string]map[string]int64{}
	for _, a := range log {
		dgst, ok := a.Blob()
		if !ok || a.Method != http.MethodGet {
			continue
		}
		if sent[dgst.String()] == nil {
			sent[dgst.String()] = map[string]int64{}
		}
		sent[dgst.String()][a.Client()] += a.Bytes
	}
	fetcher := harness.Gantry
	if snapshotter != harness.Gantry {
		fetcher = "containerd"
	}
	for i, l := range im.Layers {
		got := sent[l.Digest.String()]
		if len(got) != 1 || got[fetcher] != l.Size {
			t.Errorf("layer %d (%d bytes) was sent as %v, want all of it to %s once", i, l.Size, got, fetcher)
		}
	}
	if got := sent[im.Config.Digest.String()]; got["containerd"] == 0 {
		t.Errorf("config was sent as %v, want containerd to have fetched it", got)
	}
}

// checkImage wants the content complete and unpacked, by containerd's own reckoning.
func checkImage(t *testing.T, n *harness.Node, namespace, ref string) {
	t.Helper()
	if err := n.Complete(t.Context(), namespace, ref); err != nil {
		t.Error(err)
	}
	out, err := n.Ctr(t.Context(), namespace, "image", "check", "--snapshotter", n.Snapshotter, "name=="+ref)
	if err != nil || !strings.Contains(out, "complete") || strings.Contains(out, "incomplete") {
		t.Errorf("image check: %s (%v)", out, err)
	}
}

// checkLeaves pushes, exports and imports the pulled image.
func checkLeaves(t *testing.T, n *harness.Node, r *harness.Registry, ref string) {
	t.Helper()
	target := r.Host() + "/again:test"
	if _, err := n.Ctr(t.Context(), "default", "image", "push", target, ref); err != nil {
		t.Errorf("push: %v", err)
	}
	tar := mustExport(t, n, "default", ref)
	if _, err := n.Ctr(t.Context(), "imported", "image", "import", "--snapshotter", n.Snapshotter, tar); err != nil {
		t.Fatalf("import: %v", err)
	}
	checkImage(t, n, "imported", ref)
	mustRun(t, n, "imported", ref, "1", "/helper", "cat", "/etc/link")
}
