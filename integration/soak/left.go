package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	ccontent "github.com/containerd/containerd/v2/core/content"
	contentproxy "github.com/containerd/containerd/v2/core/content/proxy"
	"github.com/containerd/containerd/v2/core/snapshots"
	snapshotsproxy "github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/integration/harness"
)

// settled is how long what is removed in the background may take to go.
const settled = 30 * time.Second

// left says what is left though all images were removed. What killed pulls left for a retry that came and fetched
// elsewhere is gone once gantryd has started after transfer.keep_partial.
func (s *soak) left(ctx context.Context) error {
	deadline := time.Now().Add(settled)
	for {
		if err := s.node.CollectGarbage(ctx); err != nil {
			return err
		}
		err := leftBy(ctx, s.node.Dir)
		if err == nil {
			break
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		pause(ctx, time.Second)
	}
	transfers := filepath.Join(s.node.Dir, "gantry", "transfers")
	if leftTransfers(transfers) == nil {
		return nil
	}
	wait, err := untilOld(transfers)
	if err != nil {
		return err
	}
	fmt.Printf("transfers are left for a retry: waiting %s\n", wait.Round(time.Second))
	pause(ctx, wait)
	if err := s.node.Gantryd().Stop(); err != nil {
		return err
	}
	if err := s.node.StartGantryd(ctx); err != nil {
		return err
	}
	for err := leftTransfers(transfers); ; err = leftTransfers(transfers) { // it sweeps once it listens
		if err == nil || time.Now().After(deadline.Add(2*keepPartial)) {
			return err
		}
		pause(ctx, 100*time.Millisecond)
	}
}

// leftBy looks at the folder of a node without images: gantryd runs there.
func leftBy(ctx context.Context, dir string) error {
	mounts, err := harness.MountsBelow(dir)
	errs := []error{err, leak("mounts", mounts)}
	loops, err := harness.LoopsOf(dir)
	errs = append(errs, err, leak("loop devices", loops))
	root := filepath.Join(dir, "gantry")
	for _, sub := range []string{"snapshots", "mnt", "layers/sha256", "layers/blobs", "layers/tmp", "content/blobs", "content/ingest", "content/discarded"} {
		files, err := filesBelow(filepath.Join(root, sub))
		errs = append(errs, err, leak(sub, files))
	}
	return errors.Join(append(errs, leftInDatabase(ctx, filepath.Join(dir, "g.sock")))...)
}

func leak(what string, names []string) error {
	if len(names) == 0 {
		return nil
	}
	return fmt.Errorf("LEAK: %s: %d are left: %s", what, len(names), strings.Join(names[:min(5, len(names))], ", "))
}

// filesBelow lists everything below a folder but the folders that sort by algorithm. A folder that is missing has nothing.
func filesBelow(root string) ([]string, error) {
	var found []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || path == root || (d.IsDir() && strings.HasPrefix(d.Name(), "sha")) {
			return err
		}
		fi, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		found = append(found, fmt.Sprintf("%s (%s, of %s)", path, fi.Mode(), fi.ModTime().Format(time.TimeOnly)))
		return nil
	})
	return found, err
}

// untilOld is how long it takes until all transfers are older than keepPartial.
func untilOld(root string) (time.Duration, error) {
	files, err := filepath.Glob(filepath.Join(root, "sha256-*", "*"))
	if err != nil {
		return 0, err
	}
	var newest time.Time
	for _, path := range files {
		fi, err := os.Lstat(path)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, err
		}
		if err == nil && fi.ModTime().After(newest) {
			newest = fi.ModTime()
		}
	}
	return max(0, time.Until(newest.Add(keepPartial+time.Second))), nil
}

func leftTransfers(root string) error {
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	var names []string
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "sha256-") {
			names = append(names, e.Name())
		}
	}
	return leak("transfers", names)
}

// leftInDatabase asks gantryd itself for snapshots, blobs and ingests, past containerd's metadata.
func leftInDatabase(ctx context.Context, address string) (err error) {
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	ctx = namespaces.WithNamespace(ctx, "default")
	var keys, blobs, ingests []string
	errs := []error{snapshotsproxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "gantry").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		keys = append(keys, i.Name)
		return nil
	})}
	store := contentproxy.NewContentStore(conn)
	errs = append(errs, store.Walk(ctx, func(i ccontent.Info) error {
		blobs = append(blobs, i.Digest.String())
		return nil
	}))
	statuses, err := store.ListStatuses(ctx)
	for _, status := range statuses {
		ingests = append(ingests, status.Ref)
	}
	return errors.Join(append(errs, err, leak("snapshots in the database", keys), leak("blobs in the database", blobs), leak("ingests", ingests))...)
}
