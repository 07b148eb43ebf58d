package integration

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

// TestEightClientsAndAnotherProcess has eight clients in eight namespaces pull what a second gantryd, with a root and a
// containerd of its own but the same folder of transfers, pulls at the same time: each layer is sent once.
func TestEightClientsAndAnotherProcess(t *testing.T) {
	f := newFaultRegistry(t, harness.FaultOptions{Total: 100_000_000})
	first, second := sharing(t, f, "")
	im := random(t, 30, 100, 60, 40)
	ref := f.AddImage(im, "shared", "test")
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 8 {
		g.Go(func() error { return first.PullClient(ctx, fmt.Sprintf("ns%d", i), ref) })
	}
	g.Go(func() error { return pullDefault(ctx, second, ref) })
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

// TestHolderDies kills the gantryd that fetches, in the middle, while another one on the same folder of transfers
// waits for it: that one goes on from what is there.
func TestHolderDies(t *testing.T) {
	f := newFaultRegistry(t, harness.FaultOptions{Total: 50_000_000})
	first, second := sharing(t, f, "")
	im := random(t, 31, 100, 60)
	ref := f.AddImage(im, "orphaned", "test")
	pulls := make(chan error, 2)
	go func() { pulls <- pullDefault(t.Context(), first, ref) }()
	until(t, pulls, func() bool { return f.Sent() > 10<<20 })
	go func() { pulls <- pullDefault(t.Context(), second, ref) }()
	until(t, pulls, func() bool { return f.Sent() > 60<<20 })
	first.KillGantryd()
	if err := <-pulls; err == nil {
		t.Error("the pull succeeded although its gantryd was killed")
	}
	if err := <-pulls; err != nil {
		t.Fatal(err)
	}
	checkWhole(t, second, "default", ref, im)
	checkFetcher(t, f, im)
	if err := first.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkSent(t, f, im, 1.05)
}

// sharing starts two nodes whose gantryds have one folder of transfers; keys are for [transfer] of both.
func sharing(t *testing.T, f *harness.FaultRegistry, keys string) (first, second *harness.Node) {
	t.Helper()
	first = newFaultyNode(t, harness.Options{GantryExtra: "[transfer]\n" + keys}, f)
	root := filepath.Join(first.Dir, "gantry", "transfers")
	second = newFaultyNode(t, harness.Options{GantryExtra: fmt.Sprintf("[transfer]\nroot = %q\n%s", root, keys)}, f)
	return first, second
}

func pullDefault(ctx context.Context, n *harness.Node, ref string) error {
	_, err := n.Pull(ctx, "default", ref)
	return err
}

// TestOneFallsBackForAll has three clients wait for layers that gantry is refused: one of them fetches, and the others
// follow it.
func TestOneFallsBackForAll(t *testing.T) {
	im := random(t, 33, 60, 40, 20)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	f.SetRule(func(r *http.Request) *harness.Fault {
		if fromGantry(r) && isBlob(r) {
			return &harness.Fault{Status: http.StatusUnauthorized}
		}
		return nil
	})
	g, ctx := errgroup.WithContext(t.Context())
	for i := range 3 {
		g.Go(func() error { return n.PullClient(ctx, fmt.Sprintf("ns%d", i), ref) })
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		checkImage(t, n, fmt.Sprintf("ns%d", i), ref)
	}
	checkFiles(t, n, im)
	for i, l := range im.Layers {
		sent := f.BlobBytes()[l.Digest]
		t.Logf("layer %d: %.2f x", i, float64(sent["containerd"])/float64(l.Size))
		if sent["containerd"] > l.Size*11/10 || sent[harness.Gantry] != 0 {
			t.Errorf("layer %d of %d bytes was sent as %v, want all of it to containerd about once", i, l.Size, sent)
		}
	}
}
