package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

// TestCollectionDuringPulls collects garbage all the time while images are
// pulled and removed: what is pulled stays whole, and what is removed goes.
func TestCollectionDuringPulls(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	var refs []string
	for i := range 4 {
		// Nothing lies below what they do not share: a collection between containerd's look at a snapshot and its use by
		// another pull fails that pull ("parent snapshot does not exist"), or leaves it without the blob.
		spec := small(uint64(10+i), 6<<20)
		spec.Layers[0], spec.Layers[1] = spec.Layers[1], spec.Layers[0]
		_, ref := push(t, r, p.Host(), fmt.Sprint("gc", i), spec)
		refs = append(refs, ref)
	}
	ctx, stop := context.WithCancel(t.Context())
	collector := make(chan error, 1)
	go func() {
		var err error
		for ctx.Err() == nil && err == nil {
			err = n.CollectGarbage(context.WithoutCancel(ctx)) // stop ends the loop, not a collection
		}
		collector <- err
	}()
	var g errgroup.Group
	for i, ref := range refs {
		g.Go(func() error {
			for range 3 {
				if _, err := n.Pull(t.Context(), "default", ref, []string{"--local"}[:i%2]...); err != nil {
					return err
				}
				if err := n.Complete(t.Context(), "default", ref); err != nil {
					return err
				}
				if err := n.RemoveImage(t.Context(), "default", ref); err != nil {
					return err
				}
			}
			_, err := n.Pull(t.Context(), "default", ref)
			return err
		})
	}
	err := g.Wait()
	stop()
	if err := errors.Join(err, <-collector); err != nil {
		t.Fatal(err)
	}
	for i, ref := range refs {
		checkImage(t, n, "default", ref)
		mustRun(t, n, "default", ref, fmt.Sprint(10+i), "/helper", "cat", "/etc/seed")
	}
	for _, ref := range refs {
		if err := n.RemoveImage(t.Context(), "default", ref); err != nil {
			t.Fatal(err)
		}
	}
	checkEmpty(t, n)
}

// checkEmpty wants nothing of any image to be left: not by containerd's reckoning, and not on disk.
func checkEmpty(t *testing.T, n *harness.Node) {
	t.Helper()
	for _, args := range [][]string{{"content", "ls", "-q"}, {"snapshot", "--snapshotter", n.Snapshotter, "ls"}} {
		out, err := n.Ctr(t.Context(), "default", args...)
		if err != nil || strings.Contains(out, "sha256:") {
			t.Errorf("ctr %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	if n.Snapshotter != harness.Gantry {
		return
	}
	eventually(t, "layers unmounted", func() error {
		mounts, err := harness.MountsBelow(n.Dir)
		loops, lerr := harness.LoopsOf(n.Dir)
		mounts = append(slices.DeleteFunc(mounts, func(m string) bool { return m == filepath.Join(n.Dir, "gantry") }), loops...) // its own disk stays
		if err = errors.Join(err, lerr); err == nil && len(mounts) > 0 {
			err = fmt.Errorf("mounted: %v", mounts)
		}
		return err
	})
	eventually(t, "files of images removed", func() error {
		for _, dir := range []string{"content/blobs/sha256", "layers/sha256", "layers/blobs/sha256", "snapshots", "mnt"} {
			entries, err := os.ReadDir(filepath.Join(n.Dir, "gantry", dir))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
			if len(entries) > 0 {
				return fmt.Errorf("%s has %d entries, the first is %s", dir, len(entries), entries[0])
			}
		}
		return nil
	})
}

// eventually waits for work that is done in the background by design.
func eventually(t *testing.T, what string, check func() error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Errorf("%s: %v", what, err)
			return
		case <-tick.C:
		}
	}
}

// layerFiles lists the layer files with their modification times.
func layerFiles(t *testing.T, n *harness.Node) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(filepath.Join(n.Dir, "gantry", "layers", "sha256"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil // swept since
		}
		if err != nil {
			return err
		}
		files = append(files, fmt.Sprint(d.Name(), " ", info.ModTime().UnixNano()))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(files)
	return files
}

// TestCollectionDoesNotWait collects garbage while the registry stalls in the
// middle of a layer that gantry fetches: containerd's whole database would
// stand still if anything of gantry waited for it there.
func TestCollectionDoesNotWait(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "stalled", small(20, 64<<20))
	_, other := push(t, r, r.Host(), "other", small(21, 1<<20))
	if err := n.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	big, over := im.Layers[2].Digest, make(chan struct{})
	p.SetRule(func(req *http.Request) *harness.Fault {
		switch {
		case !strings.HasSuffix(req.URL.Path, big.String()):
			return nil
		case sentOf(p, big) < 1<<20:
			return &harness.Fault{StallAfter: 1 << 20, Until: over}
		default:
			return &harness.Fault{StallAfter: 1, Until: over}
		}
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pulled := make(chan error, 1)
	go func() {
		_, err := n.Pull(ctx, "default", ref)
		pulled <- err
	}()
	waitSent(t, p, big, 1<<20, pulled)
	limited, stop := context.WithTimeout(t.Context(), 20*time.Second)
	defer stop()
	for range 5 {
		if err := n.CollectGarbage(limited); err != nil {
			t.Fatalf("collection beside a stalled layer: %v", err)
		}
	}
	if _, err := n.Pull(limited, "default", other); err != nil {
		t.Errorf("pull of another image beside a stalled layer: %v", err)
	}
	cancel()
	if err := <-pulled; err == nil {
		t.Error("the stalled pull succeeded")
	}
	p.SetRule(nil)
	close(over) // gantry would wait longer than the test needs to
	mustPull(t, n, "default", ref)
	checkImage(t, n, "default", ref)
}
