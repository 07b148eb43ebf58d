package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// TestBuildKit builds an image on top of one in the registry, with buildkitd's containerd worker on gantry's snapshots, and
// pulls what was pushed: gantry shows what overlayfs shows, and it runs. A second build, of another step, starts from the cache.
// What was built leaves nothing when it goes.
func TestBuildKit(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	_, base := push(t, r, p.Host(), "base", small(85, 4<<20))
	if err := n.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	b, err := n.StartBuildKit(t.Context(), p.Host(), r.Host())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(b.Process().Tail())
		}
		if err := b.Close(); err != nil {
			t.Errorf("close buildkitd: %v", err)
		}
	})
	folder := t.TempDir()
	if err := os.Mkdir(filepath.Join(folder, "tree"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"one": "copied", "tree/two": "deeper"} {
		if err := os.WriteFile(filepath.Join(folder, name), []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	dockerfile := "FROM " + base + `
RUN --security=insecure ["/helper", "write", "/etc/seed", "built"]
COPY one /copied/one
COPY --chown=7:8 tree /copied/tree
RUN --security=insecure ["/helper", "rm", "/noise/003"]
RUN --security=insecure ["/helper", "fill", "/filled", "100000"]
CMD ["/helper", "cat", "/etc/link", "/copied/one", "/copied/tree/two"]
`
	var refs []string
	for i, last := range []string{"", "RUN --security=insecure [\"/helper\", \"write\", \"/last\", \"another\"]\n"} {
		if err := os.WriteFile(filepath.Join(folder, "Dockerfile"), []byte(dockerfile+last), 0o600); err != nil {
			t.Fatal(err)
		}
		p.Forget()
		ref := fmt.Sprintf("%s/built%d:test", r.Host(), i)
		refs = append(refs, ref)
		if err := b.Build(t.Context(), folder, ref); err != nil {
			t.Fatal(err)
		}
		if sent := p.BlobBytes(); i > 0 && len(sent) > 0 {
			t.Errorf("the second build was sent %v, want nothing", sent)
		}
		ctx, client := clientOf(t, theirs, "elsewhere")
		mustPull(t, theirs, "elsewhere", ref)
		im, err := client.GetImage(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		c := newContainer(ctx, t, theirs, client, im, fmt.Sprint("tree", i))
		want := treeOf(ctx, t, theirs, client, fmt.Sprint("tree", i))
		removeContainer(ctx, t, c)
		checkPulledTree(t, n, ref, want)
		if e := want["copied/tree/two"]; e.UID != 7 || e.GID != 8 || want["noise/003"].Mode != 0 || want["filled"].Size != 100000 || (want["last"].Mode != 0) != (i > 0) {
			t.Errorf("what was built is not what the Dockerfile says: %v", want)
		}
		mustRun(t, n, "elsewhere", ref, "builtcopieddeeper", "/helper", "cat", "/etc/link", "/copied/one", "/copied/tree/two")
	}
	if err := b.Prune(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, namespace := range []string{"buildkit", "elsewhere"} {
		for _, ref := range refs {
			if err := n.RemoveImage(t.Context(), namespace, ref); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, "buildkit's snapshots to go", func() error {
		out, err := n.Ctr(t.Context(), "buildkit", "snapshot", "--snapshotter", n.Snapshotter, "ls")
		if err == nil && strings.Count(out, "\n") > 1 {
			err = errors.New(out)
		}
		return err
	})
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkEmpty(t, n)
}
