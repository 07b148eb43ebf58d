package snapshotter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/short"
)

// inUserNamespace asks for a snapshot as clients do for a container in a user namespace.
var inUserNamespace = snapshots.WithLabels(map[string]string{
	snapshots.LabelSnapshotUIDMapping: "0:100000:65536", snapshots.LabelSnapshotGIDMapping: "0:200000:65536",
})

// overlaySnapshotter is containerd's own snapshotter with the layers unpacked, by names as rig.pull gives them.
func overlaySnapshotter(t *testing.T, name string, layers ...[]byte) (_ snapshots.Snapshotter, top string) {
	t.Helper()
	sn, err := overlay.NewSnapshotter(filepath.Join(t.TempDir(), "overlayfs"), overlay.WithRemapIDs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := sn.Close(); err != nil {
			t.Error(err)
		}
	})
	for i, blob := range layers {
		key := fmt.Sprintf("%s-%d", name, i)
		mounts, err := sn.Prepare(t.Context(), "extract-"+key, top)
		if err != nil {
			t.Fatal(err)
		}
		err = mount.WithTempMount(t.Context(), mounts, func(root string) error {
			_, err := archive.Apply(t.Context(), root, bytes.NewReader(blob))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := sn.Commit(t.Context(), key, "extract-"+key); err != nil {
			t.Fatal(err)
		}
		top = key
	}
	return sn, top
}

// TestIDMapped compares what a container in a user namespace sees, writes and
// leaves with containerd's overlay snapshotter.
func TestIDMapped(t *testing.T) {
	layers := image(t)
	reference, top := overlaySnapshotter(t, "x", layers...)
	want := useIDMapped(t, reference, top)
	for _, mode := range mountModes {
		for _, how := range unpacks {
			t.Run(fmt.Sprint(mode, " ", how.name), func(t *testing.T) {
				r := newRig(t, mode)
				if r.unmapped != nil {
					t.Fatalf("no id-mapped mounts here: %v", r.unmapped)
				}
				got := useIDMapped(t, r, r.pull(t, how, "x", "", layers...))
				for what, tree := range want.trees {
					t.Run(what, func(t *testing.T) { sameTree(t, got.trees[what], tree) })
				}
				if got.usage != want.usage {
					t.Errorf("usage %+v, overlayfs says %+v", got.usage, want.usage)
				}
			})
		}
	}
}

type idMappedUse struct {
	trees map[string]map[string]string
	usage snapshots.Usage
}

func useIDMapped(t *testing.T, sn snapshots.Snapshotter, image string) idMappedUse {
	t.Helper()
	use := idMappedUse{trees: map[string]map[string]string{}}
	mounts, err := sn.Prepare(t.Context(), "container", image, inUserNamespace)
	if err != nil {
		t.Fatal(err)
	}
	if again := mountsOf(t, sn, "container"); !reflect.DeepEqual(again, mounts) {
		t.Errorf("Mounts returns %v, Prepare %v", again, mounts)
	}
	use.trees["image"] = look(t, mounts)
	if err := mount.WithTempMount(t.Context(), mountsOf(t, sn, "container"), writeSome); err != nil {
		t.Fatal(err)
	}
	use.trees["written"] = look(t, mountsOf(t, sn, "container"))
	if use.usage, err = sn.Usage(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	if err := sn.Commit(t.Context(), "committed", "container"); err != nil {
		t.Fatal(err)
	}
	for name, opts := range map[string][]snapshots.Opt{"of the commit": nil, "of the image": {inUserNamespace}} {
		parent := image
		if opts == nil {
			parent = "committed"
		}
		if mounts, err = sn.View(t.Context(), name, parent, opts...); err != nil {
			t.Fatal(err)
		}
		use.trees["view "+name] = look(t, mounts)
	}
	return use
}

// mountsOf asks again each time: containerd's mount changes the options that it is given.
func mountsOf(t *testing.T, sn snapshots.Snapshotter, key string) []mount.Mount {
	t.Helper()
	mounts, err := sn.Mounts(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	return mounts
}

// writeSome changes, adds and removes files as a container's root and a user do.
func writeSome(root string) error {
	for name, id := range map[string]int{"etc/new": 0, "tmp/of-user": 1000} {
		path := filepath.Join(root, name)
		err := errors.Join(os.WriteFile(path, []byte(name), 0o640), os.Lchown(path, 100000+id, 200000+id), untimed(path))
		if err != nil {
			return err
		}
	}
	f, err := os.OpenFile(filepath.Join(root, "m/new"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(" more")
	return errors.Join(err, f.Close(), untimed(f.Name()), os.Remove(filepath.Join(root, "etc/x")), os.Chmod(filepath.Join(root, "m/sub"), 0o711))
}

func untimed(path string) error { return os.Chtimes(path, stamp, stamp) }

// A view of one layer: containerd maps no bind that is read-only, so with
// overlayfs the owners there are the host's.
func TestIDMappedViewOfOneLayer(t *testing.T) {
	layer := makeTar(t, dir("etc", 0o755, 0), reg("etc/x", "x"))
	reference, top := overlaySnapshotter(t, "x", layer)
	mounts, err := reference.Prepare(t.Context(), "container", top, inUserNamespace)
	if err != nil {
		t.Fatal(err)
	}
	want := look(t, mounts)
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			mounts, err := r.View(t.Context(), "container", r.pull(t, unpacks[0], "x", "", layer), inUserNamespace)
			if err != nil {
				t.Fatal(err)
			}
			sameTree(t, look(t, mounts), want)
		})
	}
}

// Without parents there is nothing to map: the namespace's root owns the directory.
func TestIDMappedWithoutParent(t *testing.T) {
	r := newRig(t, ModeFile)
	mounts, err := r.Prepare(t.Context(), "container", "", inUserNamespace)
	if err != nil {
		t.Fatal(err)
	}
	sameTree(t, look(t, mounts), map[string]string{".": "mode=40755 uid=100000 gid=200000"})
}

func TestIDMappedOver128Layers(t *testing.T) {
	r := newRig(t, ModeFile)
	var layers [][]byte
	for i := range short.Size(128, 24) {
		layers = append(layers, makeTar(t, reg(fmt.Sprint("f", i), "x")))
	}
	mounts, err := r.Prepare(t.Context(), "container", r.pull(t, unpacks[0], "x", "", layers...), inUserNamespace)
	if err != nil {
		t.Fatal(err)
	}
	tree := look(t, mounts)
	for i := range layers {
		if name := fmt.Sprint("f", i); !strings.Contains(tree[name], "uid=100003 gid=200004") {
			t.Errorf("%s: %q", name, tree[name])
		}
	}
}

// Where containerd was not told of remap-ids its client copies the image, with
// changed owners, and asks for a snapshot of the copy with the same labels.
func TestIDMappedCopyOfClient(t *testing.T) {
	for _, mode := range mountModes {
		for host, unmapped := range map[string]error{"able": nil, "unable": errors.New("old kernel")} {
			t.Run(fmt.Sprint(mode, " ", host), func(t *testing.T) {
				r := newRig(t, mode)
				r.unmapped = unmapped
				mounts, err := r.Prepare(t.Context(), "copy-remap", r.pull(t, unpacks[0], "x", "", image(t)...))
				if err != nil {
					t.Fatal(err)
				}
				if err := mount.WithTempMount(t.Context(), mounts, shift); err != nil {
					t.Fatal(err)
				}
				want := look(t, mounts)
				r.commit(t, "copy", "copy-remap", "")
				if mounts, err = r.Prepare(t.Context(), "container", "copy", inUserNamespace); err != nil {
					t.Fatal(err)
				}
				sameTree(t, look(t, mounts), want)
			})
		}
	}
}

// shift changes owners as containerd's client does.
func shift(root string) error {
	return filepath.WalkDir(root, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		uid, gid, err := owner(path)
		if err == nil && uid < 100000 { // not by another name of it yet
			err = os.Lchown(path, uid+100000, gid+200000)
		}
		return err
	})
}

// A host without id-mapped mounts: overlayfs does not allow them on itself.
func TestIDMappedWhereItDoesNotWork(t *testing.T) {
	r := newRigIn(t, onOverlay(t), Options{})
	if st := r.Status(); st.IDMapped || st.NotIDMapped == "" {
		t.Errorf("status %+v, want a reason against id-mapped mounts", st)
	}
	top := r.pull(t, unpacks[0], "x", "", image(t)...)
	_, err := r.Prepare(t.Context(), "k", top, inUserNamespace)
	if !errors.Is(err, ErrIDMapped) || !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "remap-ids") {
		t.Errorf("got %v, want ErrIDMapped", err)
	}
	if _, err := r.Prepare(t.Context(), "k", top); err != nil {
		t.Errorf("the key is taken: %v", err)
	}
	// A snapshot that was made when it did work.
	if _, err := r.Update(t.Context(), snapshots.Info{Name: "k", Labels: labelsOf(t, inUserNamespace)}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Mounts(t.Context(), "k"); !errors.Is(err, ErrIDMapped) {
		t.Errorf("mounts: got %v, want ErrIDMapped", err)
	}
	r.restart(t, nil)
}

func labelsOf(t *testing.T, o snapshots.Opt) map[string]string {
	t.Helper()
	var i snapshots.Info
	if err := o(&i); err != nil {
		t.Fatal(err)
	}
	return i.Labels
}

// What was written in a user namespace has shifted owners, the layers below have
// not: no mapping is right for both.
func TestIDMappedOverIDMappedIsRefused(t *testing.T) {
	r := newRig(t, ModeFile)
	if _, err := r.Prepare(t.Context(), "first", r.pull(t, unpacks[0], "x", "", image(t)...), inUserNamespace); err != nil {
		t.Fatal(err)
	}
	r.commit(t, "committed", "first", "")
	if _, err := r.Prepare(t.Context(), "second", "committed", inUserNamespace); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("got %v, want ErrFailedPrecondition", err)
	}
	if _, err := r.Prepare(t.Context(), "second", "committed"); err != nil {
		t.Errorf("as the host sees it: %v", err)
	}
}

// Annotations of a hostile image's layers reach the Prepare of their unpack as
// labels in some pulls: the layers stay what they are for everybody.
func TestIDMappedByAnnotation(t *testing.T) {
	layers := [][]byte{makeTar(t, reg("a", "a")), makeTar(t, reg("b", "b"))}
	want := reference(t, nil, layers...)
	for _, mode := range mountModes {
		t.Run(string(mode), func(t *testing.T) {
			r := newRig(t, mode)
			parent := ""
			for i, blob := range layers {
				key, name := fmt.Sprint("extract-", i), fmt.Sprint("layer-", i)
				mounts, err := r.Prepare(t.Context(), key, parent, inUserNamespace)
				if err != nil {
					t.Fatal(err)
				}
				if err := r.Adopt(t.Context(), mounts, r.store(t, blob)); err != nil {
					t.Fatal(err)
				}
				r.commit(t, name, key, "")
				parent = name
			}
			sameTree(t, r.show(t, parent), want)
			if _, err := r.Prepare(t.Context(), "container", parent, inUserNamespace); err != nil {
				t.Errorf("a container in a user namespace: %v", err)
			}
		})
	}
}

// An active snapshot whose folder was lost with the power is made again as it was.
func TestIDMappedFolderIsLost(t *testing.T) {
	r := newRig(t, ModeFile)
	top := r.pull(t, unpacks[0], "x", "", image(t)...)
	mounts, err := r.Prepare(t.Context(), "container", top, inUserNamespace)
	if err != nil {
		t.Fatal(err)
	}
	want, id := look(t, mounts), r.id(t, "container")
	r.restart(t, func() {
		if err := os.RemoveAll(r.dir(id)); err != nil {
			t.Fatal(err)
		}
	})
	if mounts, err = r.Mounts(t.Context(), "container"); err != nil {
		t.Fatal(err)
	}
	sameTree(t, look(t, mounts), want)
	if !exists(r.shifted(id)) {
		t.Error("the mark of shifted owners is missing")
	}
}

func TestParseIDMap(t *testing.T) {
	t.Parallel()
	for name, tc := range map[string]struct {
		uid, gid string
		root     [2]int // of the namespace; {-1}: refused
	}{
		"one range":         {"0:1000:1", "0:2000:10", [2]int{1000, 2000}},
		"two ranges":        {"1:100001:65535,0:1000:1", "0:5:1", [2]int{1000, 5}},
		"identity":          {"0:0:4294967295", "0:0:4294967295", [2]int{0, 0}},
		"no group":          {"0:1000:1", "", [2]int{-1}},
		"no user":           {"", "0:1000:1", [2]int{-1}},
		"no root":           {"1:1000:5", "0:1000:1", [2]int{-1}},
		"two numbers":       {"0:1000", "0:1000:1", [2]int{-1}},
		"four numbers":      {"0:1000:1:1", "0:1000:1", [2]int{-1}},
		"no number":         {"0:x:1", "0:1000:1", [2]int{-1}},
		"negative":          {"0:-1:1", "0:1000:1", [2]int{-1}},
		"empty range":       {"0:1000:0", "0:1000:1", [2]int{-1}},
		"past the last id":  {"0:4294967295:1", "0:1000:1", [2]int{-1}},
		"too many":          {"0:4294967000:1000", "0:1000:1", [2]int{-1}},
		"another option":    {"0:1000:1,upperdir=/etc", "0:1000:1", [2]int{-1}},
		"trailing comma":    {"0:1000:1,", "0:1000:1", [2]int{-1}},
		"more than 32 bits": {"0:1000:99999999999999999999", "0:1000:1", [2]int{-1}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, err := parseIDMap(map[string]string{snapshots.LabelSnapshotUIDMapping: tc.uid, snapshots.LabelSnapshotGIDMapping: tc.gid})
			switch {
			case tc.root[0] < 0 && !errdefs.IsInvalidArgument(err):
				t.Errorf("got %v, want ErrInvalidArgument", err)
			case tc.root[0] >= 0 && err != nil:
				t.Error(err)
			case err == nil && [2]int{m.rootUID, m.rootGID} != tc.root:
				t.Errorf("root is %d:%d, want %v", m.rootUID, m.rootGID, tc.root)
			}
		})
	}
	if m, err := parseIDMap(map[string]string{"a": "b"}); m != nil || err != nil {
		t.Errorf("without labels: %v, %v", m, err)
	}
	if _, err := parseIDMap(map[string]string{snapshots.LabelSnapshotUIDMapping: "0:1:1"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("one label: got %v, want ErrInvalidArgument", err)
	}
}

// The same where the layer is not adopted but unpacked through the mounts, as containerd's own differ does: who may
// write to an image's root is nothing that its annotations say, for all images with these layers share it.
func TestIDMappedByAnnotationThroughMounts(t *testing.T) {
	r := newRig(t, ModeFile)
	chain := func(name string) string { return "extract-123456789-AbC_ " + digest.FromString(name).String() }
	for _, parent := range []string{"", r.pull(t, unpacks[0], "x", "", image(t)[0])} {
		key := "default/7/" + chain(parent)
		mounts, err := r.Prepare(t.Context(), key, parent, inUserNamespace)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(fmt.Sprint(mounts), "idmap") {
			t.Errorf("mounts %v", mounts)
		}
		if err := mount.WithTempMount(t.Context(), mounts, write("f", nil)); err != nil {
			t.Fatal(err)
		}
		r.commit(t, "done"+parent, key, "")
		if got := r.show(t, "done"+parent)["."]; got != "mode=40755 uid=0 gid=0" {
			t.Errorf("over %q the root is %s", parent, got)
		}
		if _, err := r.Prepare(t.Context(), "container"+parent, "done"+parent, inUserNamespace); err != nil {
			t.Errorf("a container in a user namespace: %v", err)
		}
	}
}
