package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/harness"
)

// checked runs `gantry check` and returns what it printed and its exit code.
func checked(t *testing.T, n *harness.Node, args ...string) (string, int) {
	t.Helper()
	out, err := n.GantryCLI(t.Context(), append([]string{"check"}, args...)...)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return out + err.Error(), exit.ExitCode()
	}
	if err != nil {
		t.Fatal(err)
	}
	return out, 0
}

// wantClean wants a check to find nothing.
func wantClean(t *testing.T, n *harness.Node) {
	t.Helper()
	if out, code := checked(t, n); code != 0 || !strings.Contains(out, ": no faults\n") {
		t.Fatalf("exit code %d:\n%s", code, out)
	}
}

// flipByte changes one byte of a file, whatever its mode.
func flipByte(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var p [1]byte
	if _, err := f.ReadAt(p[:], off); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 0x40
	if _, err := f.WriteAt(p[:], off); err != nil {
		t.Fatal(err)
	}
}

// snapshotOf finds the folder of the snapshot that links a layer.
func snapshotOf(t *testing.T, n *harness.Node, diffID digest.Digest) string {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(n.Dir, "gantry", "snapshots", "*", "diffid"))
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		if text, err := os.ReadFile(r); err == nil && strings.HasPrefix(string(text), diffID.String()) {
			return filepath.Dir(r)
		}
	}
	t.Fatalf("no snapshot has layer %s", diffID)
	return ""
}

// Whatever one breaks, check names it, --repair cures it, and then a pull and a run give what the image holds.
func TestCheckRepairs(t *testing.T) {
	needGantry(t)
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(91, 3<<20))
	if err != nil {
		t.Fatal(err)
	}
	f := newFaultRegistry(t, harness.FaultOptions{})
	n := newFaultyNode(t, harness.Options{}, f)
	ref := f.AddImage(im, "faulty/check", "test")
	mustPull(t, n, "default", ref)
	mustRun(t, n, "default", ref, "91")
	want, err := n.Tree(t.Context(), "default", im)
	if err != nil {
		t.Fatal(err)
	}
	wantClean(t, n)

	root := filepath.Join(n.Dir, "gantry")
	blob := func(d digest.Digest) string { return filepath.Join(root, "content", "blobs", "sha256", d.Encoded()) }
	layer := func(i int) string { return filepath.Join(root, "layers", "sha256", im.DiffIDs[i].Encoded()) }
	snapshot := func(i int) string { return snapshotOf(t, n, im.DiffIDs[i]) }
	remove := func(path string) {
		if err := os.RemoveAll(path); err != nil {
			t.Fatal(err)
		}
	}
	device := func(i int) uint64 {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(root, "mnt", filepath.Base(snapshot(i))), &st); err != nil {
			t.Fatal(err)
		}
		return st.Dev
	}
	// Of each case nothing that breaks depends on another thing that does.
	for _, tc := range []struct {
		name    string
		damage  func()
		words   []string // that name it
		remount []int    // layers that are shown by a new mount afterwards: the old one has the old bytes in memory
	}{
		{"blobs", func() {
			flipByte(t, blob(im.Layers[2].Digest), 1<<20)
			remove(blob(im.Layers[1].Digest))
		}, []string{"fault: blob ", im.Layers[2].Digest.Encoded(), im.Layers[1].Digest.Encoded() + ": the file is gone", "default/" + ref}, nil},
		{"manifest and config", func() {
			flipByte(t, blob(im.Manifest.Digest), 20)
			flipByte(t, blob(im.Config.Digest), 20)
		}, []string{im.Manifest.Digest.Encoded(), im.Config.Digest.Encoded(), "default/" + ref}, nil},
		{"layer files, one with its blob", func() {
			flipByte(t, layer(0), 4096)
			flipByte(t, layer(2), 2<<20)
			flipByte(t, blob(im.Layers[2].Digest), 5000)
		}, []string{"fault: layer file ", im.DiffIDs[0].String(), im.DiffIDs[2].String(), im.Layers[2].Digest.Encoded(), "default/" + ref}, []int{0, 2}},
		{"truncated layer, index, layer's name", func() {
			if err := os.Truncate(layer(2), 1<<20); err != nil {
				t.Fatal(err)
			}
			flipByte(t, filepath.Join(snapshot(1), "index"), 1500)
			remove(layer(0))
		}, []string{
			im.DiffIDs[2].Encoded(), "its 1048576 bytes", filepath.Join(snapshot(1), "index") + ": the index is damaged",
			im.DiffIDs[0].Encoded() + ": the layer file has lost its name", "default/" + ref,
		}, []int{1, 2}},
		{"layer link, record", func() {
			remove(filepath.Join(snapshot(2), "layer"))
			flipByte(t, filepath.Join(snapshot(1), "diffid"), 3)
		}, []string{"fault: snapshot ", "the link to its layer file is missing", "diffid: the digest of its layer cannot be read", "default/" + ref}, nil},
		{"snapshot folders", func() {
			remove(snapshot(2))
			remove(snapshot(0))
		}, []string{snapshot(2) + ": the snapshot's folder is gone", snapshot(0) + ": the snapshot's folder is gone", "default/" + ref}, []int{0, 2}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var shown []uint64
			for _, i := range tc.remount {
				shown = append(shown, device(i))
			}
			tc.damage()
			out, code := checked(t, n)
			if code != 1 {
				t.Errorf("exit code %d, want 1", code)
			}
			for _, w := range tc.words {
				if !strings.Contains(out, w) {
					t.Errorf("check does not say %q", w)
				}
			}
			fixed, code := checked(t, n, "--repair")
			if code != 0 || !strings.Contains(fixed, "repaired: ") || strings.Contains(fixed, "not repaired") {
				t.Errorf("repair: exit code %d", code)
			}
			if t.Failed() {
				t.Fatalf("check:\n%s\nrepair:\n%s", out, fixed)
			}
			wantClean(t, n)
			for j, i := range tc.remount {
				if device(i) == shown[j] {
					t.Errorf("layer %d is still shown by the old mount", i)
				}
			}
			mustPull(t, n, "default", ref)
			mustRun(t, n, "default", ref, "91")
			got, err := n.Tree(t.Context(), "default", im)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("the image's files differ after the repair")
			}
			for i, l := range im.Layers {
				if got, err := getContent(t, n, l.Digest); err != nil || got != l.Digest {
					t.Errorf("blob %d reads as %s, %v", i, got, err)
				}
			}
		})
	}
	// What a program reads.
	flipByte(t, blob(im.Layers[0].Digest), 100)
	out, code := checked(t, n, "--json")
	var fault struct {
		State string
		Fault struct{ What, Where, Cure string }
	}
	for line := range strings.Lines(out) {
		if strings.Contains(line, `"found"`) {
			if err := json.Unmarshal([]byte(line), &fault); err != nil {
				t.Fatal(err)
			}
		}
	}
	if code != 1 || fault.State != "found" || fault.Fault.What != "blob" || fault.Fault.Where != blob(im.Layers[0].Digest) {
		t.Errorf("exit code %d, %+v", code, fault)
	}
}

// A gantryd whose database is garbage or cut short does not start; check says why, and goes back to the copy.
func TestCheckDatabase(t *testing.T) {
	needGantry(t)
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(92, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	f := newFaultRegistry(t, harness.FaultOptions{})
	n := newFaultyNode(t, harness.Options{}, f)
	ref := f.AddImage(im, "faulty/check", "test")
	mustPull(t, n, "default", ref)
	if err := n.RunDetached(t.Context(), "default", ref, "steady", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	mustExec(t, n, "steady", "/helper", "write", "/precious", "what the container wrote")
	database := filepath.Join(n.Dir, "gantry", "metadata.db")
	for _, tc := range []struct {
		name   string
		damage func() error
	}{
		{"garbage", func() error { return os.WriteFile(database, bytes.Repeat([]byte("garbage "), 8192), 0o600) }},
		{"cut short", func() error { return os.Truncate(database, 2*4096) }},
		{"a page overwritten", func() error {
			b, err := os.ReadFile(database)
			for i := 2 * 4096; i < len(b); i++ {
				b[i] ^= 0x55
			}
			return errors.Join(err, os.WriteFile(database, b, 0o600))
		}},
		{"gone", func() error { return os.Remove(database) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := n.Gantryd().Stop(); err != nil {
				t.Fatal(err)
			}
			wantClean(t, n)
			if err := tc.damage(); err != nil {
				t.Fatal(err)
			}
			// gantryd must not tidy up what it does not know.
			if err := n.StartGantryd(t.Context()); err == nil {
				t.Fatal("gantryd starts on a broken database")
			}
			if log := n.Gantryd().Tail(); !strings.Contains(log, "gantry check") {
				t.Errorf("gantryd does not say what to do: %s", log)
			}
			out, code := checked(t, n)
			if code != 1 || !strings.Contains(out, "fault: database "+database) {
				t.Errorf("exit code %d:\n%s", code, out)
			}
			out, code = checked(t, n, "--repair")
			if code != 0 || !strings.Contains(out, "repaired: database "+database+": it is again as it was saved") {
				t.Errorf("repair: exit code %d:\n%s", code, out)
			}
			if err := n.StartGantryd(t.Context()); err != nil {
				t.Fatal(err)
			}
			wantClean(t, n)
			untilServed(t, n, ref)
			mustRun(t, n, "default", ref, "92")
			checkImage(t, n, "default", ref)
			if got := mustExec(t, n, "steady", "/helper", "cat", "/precious"); got != "what the container wrote" {
				t.Errorf("the container reads %q", got)
			}
		})
	}
}

// untilServed pulls until containerd has found out that gantryd is back.
func untilServed(t *testing.T, n *harness.Node, ref string) {
	t.Helper()
	for try := 0; ; try++ {
		_, err := n.Pull(t.Context(), "default", ref)
		if err == nil {
			return
		}
		if try > 50 {
			t.Fatal(err)
		}
	}
}

// Where no registry has a broken layer any more, it is dropped, containerd forgets it, and a pull that needs it fetches it.
func TestCheckDropsWhatCannotBeFetched(t *testing.T) {
	needGantry(t)
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(93, 2<<20))
	if err != nil {
		t.Fatal(err)
	}
	f := newFaultRegistry(t, harness.FaultOptions{})
	n := newFaultyNode(t, harness.Options{}, f)
	ref := f.AddImage(im, "faulty/check", "test")
	mustPull(t, n, "default", ref)
	root := filepath.Join(n.Dir, "gantry")
	layer, manifest := im.Layers[2].Digest, im.Manifest.Digest
	blobs := filepath.Join(root, "content", "blobs", "sha256")
	flipByte(t, filepath.Join(blobs, layer.Encoded()), 777)
	flipByte(t, filepath.Join(blobs, manifest.Encoded()), 77)
	f.SetRule(func(*http.Request) *harness.Fault { return &harness.Fault{Status: http.StatusNotFound} })
	out, code := checked(t, n, "--repair")
	if code != 1 || !strings.Contains(out, layer.Encoded()+": removed, a pull that needs it fetches it") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	// Forgetting a manifest would free all of its image: it stays until it can be had.
	if !strings.Contains(out, "not repaired: blob "+filepath.Join(blobs, manifest.Encoded())) || !strings.Contains(out, "repeat this when its registry answers") {
		t.Errorf("the manifest:\n%s", out)
	}
	if _, err := os.Stat(filepath.Join(blobs, layer.Encoded())); err == nil {
		t.Error("the broken layer is still there")
	}
	f.SetRule(nil)
	before := f.SentBlob(layer)
	if out, code = checked(t, n, "--repair"); code != 0 || !strings.Contains(out, manifest.Encoded()+": fetched again") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	mustPull(t, n, "default", ref)            // which needs no layer of an image that is unpacked
	mustPull(t, n, "default", ref, "--local") // and this one fetches all
	if f.SentBlob(layer) == before {
		t.Error("the pull did not fetch the layer")
	}
	if got, err := getContent(t, n, layer); err != nil || got != layer {
		t.Errorf("the layer reads as %s, %v", got, err)
	}
	checkImage(t, n, "default", ref)
	mustRun(t, n, "default", ref, "93")
	wantClean(t, n)
}

// A layer file that is broken while its compressed bytes are discarded is fetched and made anew; so is a broken record.
func TestCheckDiscarded(t *testing.T) {
	needGantry(t)
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(94, 2<<20))
	if err != nil {
		t.Fatal(err)
	}
	f := newFaultRegistry(t, harness.FaultOptions{})
	n := newFaultyNode(t, harness.Options{GantryExtra: discarding}, f)
	ref := f.AddImage(im, "faulty/check", "test")
	mustPull(t, n, "default", ref)
	wantDiscarded(t, n, im)
	if err := n.RunDetached(t.Context(), "default", ref, "steady", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	sum := mustExec(t, n, "steady", "/helper", "sum", "/noise")
	mustExec(t, n, "steady", "/helper", "write", "/precious", "what the container wrote")
	wantClean(t, n)
	root := filepath.Join(n.Dir, "gantry")
	flipByte(t, filepath.Join(root, "layers", "sha256", im.DiffIDs[2].Encoded()), 1<<20)
	flipByte(t, filepath.Join(root, "content", "discarded", "sha256", im.Layers[1].Digest.Encoded()), 100)
	out, code := checked(t, n, "--repair")
	if code != 0 || !strings.Contains(out, "fault: layer file") || !strings.Contains(out, "fault: record") {
		t.Errorf("exit code %d:\n%s", code, out)
	}
	wantClean(t, n)
	mustPull(t, n, "default", ref)
	mustRun(t, n, "default", ref, "94")
	if got, err := n.Run(t.Context(), "default", ref, "again", "/helper", "sum", "/noise"); err != nil || strings.TrimSpace(got) != sum {
		t.Errorf("a new container reads %s, want %s, %v", got, sum, err)
	}
	if got := mustExec(t, n, "steady", "/helper", "cat", "/precious"); got != "what the container wrote" {
		t.Errorf("the container reads %q", got)
	}
}

// On a busy node nothing that is under way is a fault.
func TestCheckOnBusyNode(t *testing.T) {
	needGantry(t)
	f := newFaultRegistry(t, harness.FaultOptions{Total: 60_000_000})
	n := newFaultyNode(t, harness.Options{}, f)
	const pulls = 20
	refs := make([]string, pulls)
	for i := range refs {
		im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(uint64(1000+i), 4<<20))
		if err != nil {
			t.Fatal(err)
		}
		refs[i] = f.AddImage(im, fmt.Sprint("faulty/busy", i), "test")
	}
	done := make(chan error, pulls)
	for i, ref := range refs {
		go func() {
			_, err := n.Pull(t.Context(), "default", ref)
			if err == nil {
				_, err = n.Run(t.Context(), "default", ref, fmt.Sprint("busy", i))
			}
			if err == nil && i%3 == 0 {
				err = n.RemoveImage(t.Context(), "default", ref)
			}
			done <- err
		}()
	}
	checks := 0
	for left := pulls; left > 0; {
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("pull, run, remove: %v", err)
			}
			left--
			continue
		default:
		}
		out, code := checked(t, n)
		if code != 0 {
			t.Errorf("check %d with %d pulls under way: exit code %d:\n%s", checks, left, code, out)
		}
		checks++
	}
	t.Logf("%d checks", checks)
	wantClean(t, n)
}
