package plugin

import (
	"context"
	"fmt"
	"slices"
	"strings"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/gantryd/gantry/plugin/check"
)

// snapshotLabel is what containerd puts on the config of an image that is unpacked, with the snapshotter's name behind it
// and the chain ID of its last layer as its value.
const snapshotLabel = "containerd.io/gc.ref.snapshot."

// checkForgotten looks for images' snapshots that containerd has on record and gantryd does not know: metadata.db was
// restored from a copy that is older, or root is another one. Only a gantryd that runs can be asked through containerd.
func (c *checking) checkForgotten(ctx context.Context) error {
	if c.known == nil || c.known.snapshotter == "" || c.snapshots == nil || c.alone {
		return nil
	}
	there, err := c.snapshots.Names(ctx)
	if err != nil {
		return fmt.Errorf("snapshots: %w", err)
	}
	asked := map[string]bool{}
	for _, i := range c.known.images {
		for _, chain := range slices.Backward(i.chains) { // children first, as they are to be removed
			name := i.namespace + "/" + chain
			if there[name] || asked[name] {
				continue
			}
			asked[name] = true
			still, err := c.containerd.remembers(ctx, i.namespace, c.known.snapshotter, chain)
			if err != nil {
				return err
			}
			if !still {
				continue
			}
			if err := c.report(c.forgotten(i.namespace, chain)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (c *checking) forgotten(namespace, chain string) finding {
	snapshotter := c.known.snapshotter
	return finding{
		order: orderSnapshot,
		Fault: check.Fault{
			What: "snapshot", Where: namespace + "/" + chain, Problem: "containerd has it on record, and gantryd does not know it",
			Meaning:  "a pull of the image says that the snapshot already exists, and new containers of it do not start",
			Affected: c.known.affected(chain),
			Cure:     "remove the containers of the image; then gantry check --repair has containerd forget it, and a pull of the image makes it again",
		},
		repair: func(ctx context.Context) (string, error) {
			still, err := c.containerd.remembers(ctx, namespace, snapshotter, chain)
			if err != nil || !still {
				return soundNow, err
			}
			if err := c.containerd.forgetSnapshot(ctx, namespace, snapshotter, chain); err != nil {
				return "", err
			}
			return "containerd has forgotten it: pull the image again", nil
		},
	}
}

// remembers says whether containerd has a snapshot on record that gantryd does not know. containerd asks gantryd, under
// the name that it has for it there, "namespace/number/name", which is in gantryd's error.
func (c *containerd) remembers(ctx context.Context, namespace, snapshotter, name string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	_, err := snapshotsapi.NewSnapshotsClient(c.conn).Stat(namespaces.WithNamespace(ctx, namespace), &snapshotsapi.StatSnapshotRequest{Snapshotter: snapshotter, Key: name})
	if err = errgrpc.ToNative(err); err == nil {
		return false, nil
	}
	if !errdefs.IsNotFound(err) {
		return false, fmt.Errorf("ask containerd for snapshot %s in namespace %s: %w", name, namespace, err)
	}
	return strings.Contains(err.Error(), "snapshot "+namespace+"/") && strings.Contains(err.Error(), "/"+name), nil
}

func (c *containerd) forgetSnapshot(ctx context.Context, namespace, snapshotter, name string) error {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	_, err := snapshotsapi.NewSnapshotsClient(c.conn).Remove(namespaces.WithNamespace(ctx, namespace), &snapshotsapi.RemoveSnapshotRequest{Snapshotter: snapshotter, Key: name})
	if err = errgrpc.ToNative(err); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("have containerd forget snapshot %s in namespace %s (containers made from it come first): %w", name, namespace, err)
	}
	return nil
}
