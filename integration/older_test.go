package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// TestOlderContainerd has the same drop-in serve the last two lines of containerd before the newest: pods, pulls by ctr
// both ways, push, export and import, and removal.
func TestOlderContainerd(t *testing.T) {
	for _, line := range []string{"2.3", "2.2"} {
		t.Run(line, func(t *testing.T) {
			n := newCRI(t, "", harness.Options{Line: line})
			version, err := n.Ctr(t.Context(), "default", "version")
			if err != nil || strings.Count(version, "v"+line+".") != 2 {
				t.Fatalf("ctr and containerd are %s (%v), want %s", version, err, line)
			}
			checkCRI(t, n)
			var refs []string
			for j, args := range [][]string{nil, {"--local"}} {
				seed := uint64(1 + j)
				im, ref := push(t, n.registry, n.proxy.Host(), fmt.Sprint("line", seed), small(seed, 4<<20))
				mustPull(t, n.Node, "default", ref, args...)
				if snapshotter == harness.Gantry {
					im.Layers = im.Layers[1:] // the first is the pause image's
					checkBlobBytes(t, n.proxy, im, 1)
				}
				checkImage(t, n.Node, "default", ref)
				mustRun(t, n.Node, "default", ref, fmt.Sprint(seed), "/helper", "cat", "/etc/link")
				refs = append(refs, ref)
			}
			checkLeaves(t, n.Node, n.registry, refs[0])
			for _, ref := range refs {
				if err := n.RemoveImage(t.Context(), "default", ref); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.RemoveImage(t.Context(), "imported", refs[0]); err != nil {
				t.Fatal(err)
			}
			for _, what := range [][]string{{"content", "ls", "-q"}, {"snapshot", "--snapshotter", n.Snapshotter, "ls"}} {
				if out, err := n.Ctr(t.Context(), "default", what...); err != nil || strings.Contains(out, "sha256:") {
					t.Errorf("ctr %s: %v\n%s", strings.Join(what, " "), err, out)
				}
			}
		})
	}
}
