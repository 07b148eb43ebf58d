package plugin

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	ccontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	snapshotsproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/plugin/check"
)

// gather collects what a check tells.
func gather(run func(send func(check.Event) error) error) (faults []string, notes int, last check.Event, err error) {
	err = run(func(e check.Event) error {
		last = e
		if e.Fault != nil {
			faults = append(faults, e.State+" "+e.Fault.What+" "+filepath.Base(e.Fault.Where))
		}
		if e.Note != "" {
			notes++
		}
		return nil
	})
	return faults, notes, last, err
}

// The same check by a running daemon and without one; only one of them at a time. containerd is away.
func TestCheckRunningAndStopped(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	_, stop := run(t, c)
	conn := dial(t, c.Address)
	store := contentproxy.NewContentStore(contentapi.NewContentClient(conn))
	ctx := namespaces.WithNamespace(t.Context(), "default")
	data := bytes.Repeat([]byte("blob"), 1<<20)
	d := digest.FromBytes(data)
	if err := ccontent.WriteBlob(ctx, store, "a", bytes.NewReader(data), ocispec.Descriptor{Digest: d, Size: int64(len(data))}); err != nil {
		t.Fatal(err)
	}
	running := func(send func(check.Event) error) error { return check.Call(t.Context(), conn, check.Request{}, send) }
	stopped := func(send func(check.Event) error) error { return Check(t.Context(), c, check.Request{}, send) }
	faults, notes, last, err := gather(running)
	if err != nil || len(faults) > 0 || notes != 1 || last.State != check.Ended || last.DoneBytes != int64(len(data)) {
		t.Errorf("running: %v, %d notes, %+v, %v", faults, notes, last, err)
	}
	if _, _, _, err := gather(stopped); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("beside a gantryd: %v", err)
	}
	path := filepath.Join(c.Content.Root, "blobs", "sha256", d.Encoded())
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("rot"), 3<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	want := "found blob " + d.Encoded()
	if faults, _, _, err := gather(running); err != nil || len(faults) != 1 || faults[0] != want {
		t.Errorf("running: %v, %v", faults, err)
	}
	// Nobody can say where it came from, so it stays.
	faults, _, _, err = gather(func(send func(check.Event) error) error {
		return check.Call(t.Context(), conn, check.Request{Repair: true}, send)
	})
	if err != nil || len(faults) != 2 || !strings.HasPrefix(faults[1], "failed blob") {
		t.Errorf("repair: %v, %v", faults, err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if faults, _, _, err := gather(stopped); err != nil || len(faults) != 1 || faults[0] != want {
		t.Errorf("stopped: %v, %v", faults, err)
	}
	// It held the root only for so long.
	_, stop = run(t, c)
	if err := stop(); err != nil {
		t.Error(err)
	}
}

func TestCheckEndsWithItsClient(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "")
	_, stop := run(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	err := check.Call(ctx, dial(t, c.Address), check.Request{}, func(check.Event) error {
		cancel()
		return nil
	})
	if err == nil {
		t.Error("no error")
	}
	enough := errors.New("enough")
	if err := Check(t.Context(), c, check.Request{}, func(check.Event) error { return enough }); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("beside a gantryd: %v", err)
	}
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := Check(t.Context(), c, check.Request{}, func(check.Event) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("nobody listens: %v", err)
	}
}

// What a container wrote and that is gone is told by every check, and no repair and no start hides it.
func TestCheckKeepsToLostUpperFiles(t *testing.T) {
	t.Parallel()
	c := testConfig(t, "[snapshotter]\nupper = 'file'\nupper_size = '16MiB'\n")
	_, stop := run(t, c)
	conn := dial(t, c.Address)
	sn := snapshotsproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "gantry")
	ctx := namespaces.WithNamespace(t.Context(), "default")
	if _, err := sn.Prepare(ctx, "container", ""); err != nil {
		t.Fatal(err)
	}
	mnt, file := filepath.Join(c.Root, "mnt", "1.rw"), filepath.Join(c.Root, "snapshots", "1", "upper.ext4")
	t.Cleanup(func() { _ = unix.Unmount(mnt, unix.MNT_DETACH) })
	if err := stop(); err != nil { // when it has come to the disk
		t.Fatal(err)
	}
	if err := errors.Join(unix.Unmount(mnt, 0), os.Remove(file)); err != nil {
		t.Fatal(err)
	}
	for _, repair := range []bool{false, true, false} {
		faults, _, _, err := gather(func(send func(check.Event) error) error {
			return Check(t.Context(), c, check.Request{Repair: repair}, send)
		})
		want := []string{"found snapshot upper.ext4"}
		if repair {
			want = append(want, "failed snapshot upper.ext4")
		}
		if err != nil || !slices.Equal(faults, want) {
			t.Errorf("repair %v: %v, %v, want %v", repair, faults, err, want)
		}
	}
	_, stop = run(t, c)
	if _, err := sn.Mounts(ctx, "container"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("got %v, want an error that names the file", err)
	}
	if err := errors.Join(sn.Remove(ctx, "container"), stop()); err != nil {
		t.Error(err)
	}
}
