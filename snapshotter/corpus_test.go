package snapshotter

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/corpus"
	"github.com/gantryd/gantry/integration/harness"
	"github.com/gantryd/gantry/integration/short"
)

// overlayfs is containerd's own way: its overlayfs snapshotter and its applier.
type overlayfs struct {
	snapshots.Snapshotter
	diff.Applier
	blobs tarBlobs
	count int
}

// tarBlobs serves tars as blobs, by their digest.
type tarBlobs map[string][]byte

type tarBlob struct {
	*bytes.Reader
}

func (tarBlob) Close() error { return nil }

func (b tarBlobs) ReaderAt(_ context.Context, desc ocispec.Descriptor) (ccontent.ReaderAt, error) {
	tar, ok := b[desc.Digest.String()]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return tarBlob{bytes.NewReader(tar)}, nil
}

func newOverlayfs(t *testing.T) *overlayfs {
	t.Helper()
	s, err := overlay.NewSnapshotter(filepath.Join(t.TempDir(), "overlayfs"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	o := &overlayfs{Snapshotter: s, blobs: tarBlobs{}}
	o.Applier = apply.NewFileSystemApplier(o.blobs)
	return o
}

// add unpacks one layer onto parent and returns the name of the snapshot.
func (o *overlayfs) add(t *testing.T, parent string, tar []byte) (string, error) {
	t.Helper()
	o.count++
	key, name := fmt.Sprint("extract-", o.count), fmt.Sprint("layer-", o.count)
	mounts, err := o.Prepare(t.Context(), key, parent)
	if err != nil {
		t.Fatal(err)
	}
	desc := descriptorOf(tar)
	o.blobs[desc.Digest.String()] = tar
	defer delete(o.blobs, desc.Digest.String())
	if _, err := o.Apply(t.Context(), desc, mounts); err != nil {
		return "", err
	}
	if err := o.Commit(t.Context(), name, key); err != nil {
		t.Fatal(err)
	}
	return name, nil
}

// tree is what a container on top of the snapshot sees.
func (o *overlayfs) tree(t *testing.T, name string) harness.FileTree {
	t.Helper()
	return viewTree(t, o.Snapshotter, name)
}

func viewTree(t *testing.T, s snapshots.Snapshotter, name string) (tree harness.FileTree) {
	t.Helper()
	views++
	key := fmt.Sprint("view-", views)
	mounts, err := s.View(t.Context(), key, name)
	if err != nil {
		t.Fatalf("view %s: %v", name, err)
	}
	err = mount.WithTempMount(t.Context(), mounts, func(root string) (err error) {
		tree, err = harness.WalkTree(root)
		return err
	})
	if err != nil {
		t.Fatalf("mount %v: %v", mounts, err)
	}
	if err := s.Remove(t.Context(), key); err != nil {
		t.Error(err)
	}
	return tree
}

func sameAsOverlayfs(t *testing.T, want, got harness.FileTree, started time.Time, except ...corpus.Exception) {
	t.Helper()
	for _, line := range corpus.Compare(want, got, started, except...) {
		t.Error(line)
	}
}

// TestCorpus mounts every image of the corpus in each mode and for each way of unpacking, and compares what is seen with
// containerd's overlayfs.
func TestCorpus(t *testing.T) {
	for k, im := range corpus.Images() {
		t.Run(im.Name, func(t *testing.T) {
			started := time.Now()
			theirs := newOverlayfs(t)
			top := ""
			for i, tar := range im.Tars {
				var err error
				if top, err = theirs.add(t, top, tar); err != nil {
					t.Fatalf("containerd refuses layer %d: %v", i, err)
				}
			}
			want := theirs.tree(t, top)
			t.Logf("%d entries", len(want))
			for i, mode := range mountModes {
				for j, how := range unpacks {
					if len(im.Tars) > 100 && how.rebase {
						continue // what many layers are for is the mount
					}
					if (k+i+j)%short.Size(1, 3) > 0 {
						continue // each image some ways, each way some images
					}
					t.Run(fmt.Sprintf("%s %s", mode, how.name), func(t *testing.T) {
						r := newRig(t, mode)
						sameAsOverlayfs(t, want, viewTree(t, r, r.pull(t, how, "im", "", im.Tars...)), started, im.Except...)
					})
				}
			}
		})
	}
}

// TestCorpusRefused holds that what containerd does not take is not taken, with an error that says why.
func TestCorpusRefused(t *testing.T) {
	var rigs []*rig
	for _, mode := range mountModes {
		rigs = append(rigs, newRig(t, mode))
	}
	theirs := newOverlayfs(t)
	for i, c := range corpus.Refused() {
		t.Run(c.Name, func(t *testing.T) {
			last := len(c.Tars) - 1
			lower := ""
			for _, tar := range c.Tars[:last] {
				var err error
				if lower, err = theirs.add(t, lower, tar); err != nil {
					t.Fatal(err)
				}
			}
			_, err := theirs.add(t, lower, c.Tars[last])
			if (err == nil) != (c.Alone != "") {
				t.Errorf("containerd: %v", err)
			}
			for _, r := range rigs {
				for _, how := range unpacks {
					name := fmt.Sprint("refused", i, how.name)
					err := r.try(t, how, name, r.pull(t, how, name+"-below", "", c.Tars[:last]...), c.Tars[last])
					if err == nil || !strings.Contains(err.Error(), c.Says) {
						t.Errorf("gantry, %s, %s: %v; it should say %q", r.opts.Mount, how.name, err, c.Says)
					}
				}
			}
		})
	}
}

// try unpacks one layer and returns the error of storing, adopting or committing it.
func (r *rig) try(t *testing.T, how unpack, name, parent string, tar []byte) error {
	t.Helper()
	at, opts := parent, []snapshots.Opt(nil)
	if how.rebase && parent != "" {
		at, opts = "", append(opts, snapshots.WithParent(parent))
	}
	mounts, err := r.Prepare(t.Context(), "extract-"+name, at)
	if err != nil {
		t.Fatal(err)
	}
	l, err := r.cache.Write(t.Context(), bytes.NewReader(tar), nil)
	if err != nil {
		return err
	}
	if err := r.Adopt(t.Context(), mounts, l.DiffID); err != nil {
		return err
	}
	return r.Commit(t.Context(), name, "extract-"+name, opts...)
}

func descriptorOf(tar []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(tar), Size: int64(len(tar))}
}

// TestCorpusTaken holds that what gantry takes beyond containerd is there, and that a host where layers are directories,
// which containerd's own code unpacks there, refuses it as containerd does.
func TestCorpusTaken(t *testing.T) {
	theirs := newOverlayfs(t)
	for i, c := range corpus.Taken() {
		t.Run(c.Name, func(t *testing.T) {
			last := len(c.Tars) - 1
			lower := ""
			for j, tar := range c.Tars {
				next, err := theirs.add(t, lower, tar)
				if (err == nil) != (j < last) {
					t.Fatalf("containerd, layer %d: %v", j, err)
				}
				lower = next
			}
			for _, mode := range mountModes {
				r, name := newRig(t, mode), fmt.Sprint("taken", i)
				below := r.pull(t, unpacks[0], name+"-below", "", c.Tars[:last]...)
				err := r.try(t, unpacks[0], name, below, c.Tars[last])
				if mode == ModeDirectory && !c.Everywhere {
					if err == nil {
						t.Errorf("%s: taken", mode)
					}
					continue
				}
				if err != nil {
					t.Errorf("%s: %v", mode, err)
					continue
				}
				e, ok := viewTree(t, r, name)[c.Path]
				if !ok || e.Xattrs[c.Xattr] != c.Value {
					t.Errorf("%s: %s is there: %v, with %d bytes of %s", mode, c.Path, ok, len(e.Xattrs[c.Xattr]), c.Xattr)
				}
			}
		})
	}
}

// TestCorpusDefaultACL shows the one thing of a lower layer that does not reach what a layer has: the default ACL of a
// directory that it only implies. The index is made of the members alone, each as if created in a new directory. Containers
// see the ACL on the directory, and it counts for what they create.
func TestCorpusDefaultACL(t *testing.T) {
	im := corpus.DefaultACL()
	began, theirs, top := time.Now(), newOverlayfs(t), ""
	for _, tar := range im.Tars {
		var err error
		if top, err = theirs.add(t, top, tar); err != nil {
			t.Fatal(err)
		}
	}
	want := theirs.tree(t, top)
	if len(want["d/f"].Xattrs) == 0 || len(want["d/sub"].Xattrs) == 0 {
		t.Fatalf("overlayfs shows no ACL: %v", want)
	}
	for _, path := range []string{"d/f", "d/sub"} {
		e := want[path]
		e.Xattrs = nil
		want[path] = e
	}
	for _, mode := range []Mode{ModeFile, ModeLoop} {
		for _, how := range unpacks {
			r := newRig(t, mode)
			sameAsOverlayfs(t, want, viewTree(t, r, r.pull(t, how, "acl", "", im.Tars...)), began)
		}
	}
}
