package integration

import (
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// discarding is the configuration of a node that keeps no compressed layers.
const discarding = "[content]\nretain = \"none\"\n"

// blobFiles are the names in the node's blobs/, with their sizes.
func blobFiles(t *testing.T, n *harness.Node) map[string]int64 {
	t.Helper()
	return files(t, filepath.Join(n.Dir, "gantry", "content", "blobs", "sha256"))
}

// records are the names of the discarded blobs.
func records(t *testing.T, n *harness.Node) map[string]int64 {
	t.Helper()
	return files(t, filepath.Join(n.Dir, "gantry", "content", "discarded", "sha256"))
}

func files(t *testing.T, folder string) map[string]int64 {
	t.Helper()
	entries, err := os.ReadDir(folder)
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	all := map[string]int64{}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = fi.Size()
	}
	return all
}

// onDisk is how many bytes the files below a folder take, each file once. What is removed meanwhile takes none: containerd
// removes snapshots when it likes.
func onDisk(t *testing.T, folder string) (n int64) {
	t.Helper()
	seen := map[uint64]bool{}
	var top syscall.Stat_t
	if err := syscall.Stat(folder, &top); err != nil {
		t.Fatal(err)
	}
	err := filepath.WalkDir(folder, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		fi, err := e.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if st.Dev != top.Dev { // a layer's mount
			return fs.SkipDir
		}
		if !e.IsDir() && !seen[st.Ino] {
			seen[st.Ino] = true
			n += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// written is what a process has had written to disks: what was dropped before it got there does not count.
func written(t *testing.T, pid int) (n int64) {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		var v int64
		if _, err := fmt.Sscanf(line, "write_bytes: %d", &v); err == nil {
			n += v
		}
		if _, err := fmt.Sscanf(line, "cancelled_write_bytes: %d", &v); err == nil {
			n -= v
		}
	}
	return n
}

// wantDiscarded wants all layers of the image to be records and no files.
func wantDiscarded(t *testing.T, n *harness.Node, im *harness.Image) {
	t.Helper()
	blobs, recs := blobFiles(t, n), records(t, n)
	for i, l := range im.Layers {
		if _, ok := blobs[l.Digest.Encoded()]; ok {
			t.Errorf("layer %d has a file in blobs/", i)
		}
		if size, ok := recs[l.Digest.Encoded()]; !ok || size > 1024+l.Size>>14 {
			t.Errorf("layer %d of %d bytes: a record is there: %t, with %d bytes", i, l.Size, ok, size)
		}
	}
	for _, d := range []string{im.Manifest.Digest.Encoded(), im.Config.Digest.Encoded()} {
		if _, ok := blobs[d]; !ok {
			t.Errorf("manifest or config %s has no file", d)
		}
	}
}

// sentLayers is how many bytes of the image's layers the registry sent so far, to all or to one client.
func sentLayers(t *testing.T, r *harness.Registry, im *harness.Image) (n int64) {
	t.Helper()
	log, err := r.Accesses()
	if err != nil {
		t.Fatal(err)
	}
	layers := map[string]bool{}
	for _, l := range im.Layers {
		layers[l.Digest.String()] = true
	}
	for _, a := range log {
		if d, ok := a.Blob(); ok && layers[d.String()] && a.Method == http.MethodGet {
			n += a.Bytes
		}
	}
	return n
}

// pullDiscarding wants a pull to write the layer files and little else. The kernel may write what others on the machine
// made it write, so what it wrote is told and only what stays is a must; TestDiscardWrites is about the rest.
func pullDiscarding(t *testing.T, n *harness.Node, im *harness.Image, ref string, args ...string) (wrote, layers int64) {
	t.Helper()
	files, root := filepath.Join(n.Dir, "gantry", "layers"), filepath.Join(n.Dir, "gantry")
	before, layersBefore, rootBefore := written(t, n.Gantryd().PID()), onDisk(t, files), onDisk(t, root)
	mustPull(t, n, "default", ref, args...)
	wrote, layers = written(t, n.Gantryd().PID())-before, onDisk(t, files)-layersBefore
	wantDiscarded(t, n, im)
	all := onDisk(t, root) - rootBefore
	t.Logf("%d bytes compressed; layer files %d, all of gantryd's root %d on disk; gantryd had %d bytes written, %.3f of the layer files",
		im.Size(), layers, all, wrote, float64(wrote)/float64(layers))
	if all > layers+layers/20 {
		t.Error("more stays than the layer files")
	}
	return wrote, layers
}

// What is discarded does not reach the disk. A machine on which others write much writes everything early: one of some
// pulls has to do.
func TestDiscardWrites(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{GantryExtra: discarding})
	for try := range uint64(4) {
		im, ref := push(t, r, p.Host(), fmt.Sprint("writes", try), small(90+try, 100<<20))
		if wrote, layers := pullDiscarding(t, n, im, ref); wrote <= layers+im.Size()/10 {
			return
		}
	}
	t.Error("compressed bytes are written to disk")
}

// A pull that keeps no compressed bytes writes the layer files and little else. The image runs, leaves the node as any
// other, and its bytes are fetched again for that.
func TestDiscard(t *testing.T) {
	needGantry(t)
	im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(1, 80<<20))
	if err != nil {
		t.Fatal(err)
	}
	for name, args := range map[string][]string{"transfer service": nil, "local": {"--local"}} {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{GantryExtra: discarding})
			ref := pushAs(t, im, r, p.Host(), "discard")
			pullDiscarding(t, n, im, ref, args...)
			compressed := im.Size()
			checkRegistryLog(t, r, im)
			checkImage(t, n, "default", ref)
			mustRun(t, n, "default", ref, "1", "/helper", "cat", "/etc/link")
			if sent := sentLayers(t, r, im); sent != compressed {
				t.Errorf("%d bytes were sent before anybody read a layer, want %d", sent, compressed)
			}
			checkLeaves(t, n, r, ref)
			if sent := sentLayers(t, r, im); sent > 2*compressed+compressed/20 {
				t.Errorf("%d bytes were sent in all, want those of two fetches, %d", sent, 2*compressed)
			}
		})
	}
}
