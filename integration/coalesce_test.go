package integration

import (
	"context"
	"fmt"
	"net/http"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

// TestEightNamespaces pulls one image from eight namespaces at once: each layer
// leaves the registry once, and all eight images are whole and run.
func TestEightNamespaces(t *testing.T) {
	needGantry(t)
	ways := map[string]func(ctx context.Context, n *harness.Node, namespace, ref string) error{
		"transfer service": func(ctx context.Context, n *harness.Node, namespace, ref string) error {
			_, err := n.Pull(ctx, namespace, ref)
			return err
		},
		// The transfer service's locks by digest carry no namespace; only the client's pulls reach gantry side by side.
		"client": func(ctx context.Context, n *harness.Node, namespace, ref string) error {
			return n.PullClient(ctx, namespace, ref)
		},
	}
	for name, pull := range ways {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			im, ref := push(t, r, p.Host(), "eight", small(2, 24<<20))
			p.SetRule(func(*http.Request) *harness.Fault { return &harness.Fault{BytesPerSecond: 16 << 20} })
			g, ctx := errgroup.WithContext(t.Context())
			for i := range 8 {
				g.Go(func() error { return pull(ctx, n, fmt.Sprintf("ns%d", i), ref) })
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			checkRegistryLog(t, r, im)
			for i := range 8 {
				namespace := fmt.Sprintf("ns%d", i)
				checkImage(t, n, namespace, ref)
				mustRun(t, n, namespace, ref, "2", "/helper", "cat", "/etc/seed")
			}
		})
	}
}

// TestSecondNamespaceUnpacksNothing pulls again elsewhere: no layer is fetched, and no layer file is written again.
func TestSecondNamespaceUnpacksNothing(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "second", small(3, 8<<20))
	mustPull(t, n, "first", ref)
	before := layerFiles(t, n)
	p.Forget()
	mustPull(t, n, "second", ref)
	for dgst, clients := range p.BlobBytes() {
		if clients[harness.Gantry] > 0 {
			t.Errorf("blob %s was fetched again: %v", dgst, clients)
		}
	}
	if after := layerFiles(t, n); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("layer files changed from %v to %v", before, after)
	}
	checkImage(t, n, "second", ref)
}
