package integration

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

// TestEightClientsAndAnotherProcess has eight clients in eight namespaces pull what a second gantryd, with a root and a
// containerd of its own but the same folder of transfers, pulls at the same time: each layer is sent once.
func TestEightClientsAndAnotherProcess(t *testing.T) {
	f := newFaultRegistry(t, harness.FaultOptions{Total: 100_000_000})
	first := newFaultyNode(t, harness.Options{}, f)
	second := newFaultyNode(t, harness.Options{
		GantryExtra: fmt.Sprintf("[transfer]\nroot = %q\n", filepath.Join(first.Dir, "gantry", "transfers")),
	}, f)
	im := random(t, 30, 100, 60, 40)
	ref := f.AddImage(im, "shared", "test")
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 8 {
		g.Go(func() error { return first.PullClient(ctx, fmt.Sprintf("ns%d", i), ref) })
	}
	g.Go(func() error { return secondPull(ctx, second, ref) })
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		checkImage(t, first, fmt.Sprintf("ns%d", i), ref)
	}
	checkFiles(t, first, im)
	checkWhole(t, second, "default", ref, im)
	for i, l := range im.Layers {
		if sent := f.SentBlob(l.Digest); sent != l.Size {
			t.Errorf("layer %d: %d bytes were sent, want its %d once", i, sent, l.Size)
		}
	}
	checkFetcher(t, f, im)
}

func secondPull(ctx context.Context, n *harness.Node, ref string) error {
	_, err := n.Pull(ctx, "default", ref)
	return err
}
