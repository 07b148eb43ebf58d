package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/harness"
)

// switchGantry takes gantry's drop-in into containerd's configuration, or out of it, as `gantry config containerd` says:
// gantryd runs before containerd asks it, and goes only after. Containers run on meanwhile.
func switchGantry(t *testing.T, n *harness.Node, on bool) {
	t.Helper()
	if err := n.Containerd().Stop(); err != nil {
		t.Fatal(err)
	}
	if on {
		if err := n.StartGantryd(t.Context()); err != nil {
			t.Fatal(err)
		}
	} else if err := n.Gantryd().Stop(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.Dir, "containerd.toml")
	with := "\nimports = ['" + n.Dir
	without := "\n#imports = ['" + n.Dir
	text := strings.Replace(readFile(t, path), without, with, 1)
	n.Snapshotter = harness.Gantry
	if !on {
		text = strings.Replace(text, with, without, 1)
		n.Snapshotter = harness.Overlayfs
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// TestSwitch goes from containerd's own store and overlayfs to gantry in the same folder, and back, with images and
// containers in place: nothing is fetched again that is there, every byte of every blob is read by whoever is on, and a
// container of before runs through all of it.
func TestSwitch(t *testing.T) {
	needGantry(t)
	for _, retain := range []string{"all", "none"} {
		t.Run(retain, func(t *testing.T) { testSwitch(t, retain) })
	}
}

func testSwitch(t *testing.T, retain string) {
	n, r, p := setup(t, harness.Options{GantryExtra: "\n[content]\nretain = 'all'\n"})
	content := filepath.Join(n.Dir, "containerd", "io.containerd.content.v1.content")
	before, oldRef := push(t, r, p.Host(), "before", small(40, 2<<20))
	after, newRef := push(t, r, p.Host(), "after", small(41, 3<<20))
	reads := func(images ...*harness.Image) {
		t.Helper()
		for _, im := range images {
			for _, d := range append([]digest.Digest{im.Manifest.Digest, im.Config.Digest}, layersOf(im)...) {
				if got, err := getContent(t, n, d); err != nil || got != d {
					t.Errorf("%s is read as %s, %v", d, got, err)
				}
			}
		}
	}
	nothingSent := func(what string, images ...*harness.Image) {
		t.Helper()
		for _, im := range images {
			for _, d := range layersOf(im) {
				if sent := sentOf(p, d); sent != 0 {
					t.Errorf("%s: %d bytes of layer %s were fetched although it is there", what, sent, d)
				}
			}
		}
	}

	// containerd as shipped.
	reconfigure(t, n, "retain = 'all'\n", fmt.Sprintf("retain = '%s'\nroot = %q\n[transfer]\nroot = %q\n", retain, content, filepath.Join(n.Dir, "containerd", "transfers")))
	switchGantry(t, n, false)
	mustPull(t, n, "default", oldRef)
	if err := n.RunDetached(t.Context(), "default", oldRef, "old", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	mustExec(t, n, "old", "/helper", "write", "/etc/own", "mine")
	sum := mustExec(t, n, "old", "/helper", "sum", "/noise")
	goesOn := func(when string) {
		t.Helper()
		if got := mustExec(t, n, "old", "/helper", "sum", "/noise"); got != sum {
			t.Errorf("%s the container reads %s, want %s", when, got, sum)
		}
		if got := mustExec(t, n, "old", "/helper", "cat", "/etc/own"); got != "mine" {
			t.Errorf("%s the container has written %q", when, got)
		}
	}
	want, err := n.Tree(t.Context(), "default", before)
	if err != nil {
		t.Fatal(err)
	}

	// gantry, in the same folder.
	switchGantry(t, n, true)
	goesOn("under gantry")
	p.Forget()
	reads(before)
	mustRun(t, n, "default", oldRef, "40", "/helper", "cat", "/etc/link")
	got, err := n.Tree(t.Context(), "default", before)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range harness.CompareTrees(want, got, overlayTimes) {
		t.Error("by gantry:", d)
	}
	nothingSent("under gantry", before)
	mustPull(t, n, "default", newRef)
	mustRun(t, n, "default", newRef, "41", "/helper", "cat", "/etc/link")

	// And back.
	if retain == "none" {
		reconfigure(t, n, "retain = 'none'", "retain = 'all'")
		out, err := n.GantryCLI(t.Context(), "content", "restore")
		if err != nil || strings.Count(out, "restored sha256:") != len(after.Layers)-1 { // the lowest came with the other image
			t.Fatalf("restore printed %s, %v", out, err)
		}
	}
	switchGantry(t, n, false)
	goesOn("without gantry")
	p.Forget()
	reads(before, after)
	mustRun(t, n, "default", oldRef, "40", "/helper", "cat", "/etc/link")
	mustRun(t, n, "default", newRef, "41", "/helper", "cat", "/etc/link")
	nothingSent("without gantry", before, after)
	if err := n.StartGantryd(t.Context()); err != nil { // for Close, which stops it
		t.Fatal(err)
	}
}

func layersOf(im *harness.Image) (all []digest.Digest) {
	for _, l := range im.Layers {
		all = append(all, l.Digest)
	}
	return all
}

// overlayTimes are the directories that overlayfs gives the time of their unpacking.
func overlayTimes(path string) bool { return path == "." || path == "noise" }
