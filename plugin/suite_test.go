package plugin

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	bolt "go.etcd.io/bbolt"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/config"
)

// TestSnapshotSuite runs containerd's own conformance suite of snapshotters against what a node has: containerd's
// metadata store before its proxy client before a whole daemon. For the name "overlayfs" see the snapshotter's own run of it.
func TestSnapshotSuite(t *testing.T) { //nolint:paralleltest // the suite changes the umask
	for _, mount := range []string{"auto", "loop", "directory"} { //nolint:paralleltest // as above
		t.Run(mount, func(t *testing.T) { //nolint:paralleltest // as above
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				return behindMetadata(ctx, root, mount)
			})
		})
	}
}

// behindMetadata starts a daemon in root; the function it returns ends it.
func behindMetadata(ctx context.Context, root, mount string) (_ snapshots.Snapshotter, _ func() error, err error) {
	var undo []func() error
	stop := func() (err error) {
		for i := len(undo) - 1; i >= 0; i-- {
			err = errors.Join(err, undo[i]())
		}
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	state, err := os.MkdirTemp("", "gantry") // the socket's address is short of room
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, func() error { return os.RemoveAll(state) })
	file := filepath.Join(state, "config.toml")
	text := fmt.Sprintf("root = %q\nstate = %q\naddress = %q\ncontainerd.address = %q\nsnapshotter.mount = %q\n",
		filepath.Join(root, "gantry"), state, filepath.Join(state, "g.sock"), filepath.Join(state, "c.sock"), mount)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, nil, err
	}
	c, err := config.Load(file)
	if err != nil {
		return nil, nil, err
	}
	d, err := New(ctx, c)
	if err != nil {
		return nil, nil, err
	}
	running, cancel := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan error, 1)
	go func() { ended <- d.Run(running) }()
	undo = append(undo, func() error {
		cancel()
		return errors.Join(<-ended, d.Close())
	})
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, conn.Close)
	db, err := bolt.Open(filepath.Join(root, "meta.db"), 0o600, &bolt.Options{Timeout: time.Second})
	if err != nil {
		return nil, nil, err
	}
	undo = append(undo, db.Close)
	client := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "gantry")
	return metadata.NewDB(db, nil, map[string]snapshots.Snapshotter{"gantry": client}).Snapshotter("gantry"), stop, nil
}
