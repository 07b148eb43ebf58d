package snapshotter

import (
	"context"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// TestSuite runs containerd's own conformance suite. Called "overlayfs" because
// that name tells the suite that directories of a lower layer cannot be renamed,
// as on any overlay without redirect_dir.
func TestSuite(t *testing.T) {
	for name, o := range map[string]Options{
		"auto": {}, "loop": {Mount: ModeLoop}, "directory": {Mount: ModeDirectory},
		"upper files": {Upper: UpperFile, UpperSize: 64 << 20},
	} {
		if testing.Short() && name != "auto" {
			continue // one client, nearly all of the time
		}
		t.Run(name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				layers, err := layer.Open(filepath.Join(root, "layers"), layer.Options{})
				if err != nil {
					return nil, nil, err
				}
				s, err := New(ctx, root, layers, o)
				if err != nil {
					return nil, nil, err
				}
				return s, func() error {
					// The suite closes some of them itself.
					if err := s.Close(); err != nil {
						return err
					}
					mountsUnder(root)
					return nil
				}, nil
			})
		})
	}
}
