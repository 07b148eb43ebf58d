package integration

import (
	"math/rand/v2"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// TestFiveKills kills gantryd at five random moments of one pull.
func TestFiveKills(t *testing.T) {
	im := random(t, 2, 400, 300, 200, 124)
	f, n, ref := faulty(t, im, harness.FaultOptions{Total: 250_000_000}, harness.Options{})
	chance := rand.New(rand.NewPCG(5, 18))
	var moments []int64
	for range 5 {
		moments = append(moments, chance.Int64N(all(im)))
	}
	slices.Sort(moments)
	pulled := make(chan error, 1)
	var failed int
	go func() {
		// As a kubelet does, for as long as gantryd is killed, and while containerd finds out that it is back.
		for {
			_, err := n.Pull(t.Context(), "default", ref)
			if err == nil || failed >= 50 {
				pulled <- err
				return
			}
			failed++
			time.Sleep(100 * time.Millisecond)
		}
	}()
	for _, moment := range moments {
		until(t, pulled, func() bool { return f.Sent() >= moment })
		n.KillGantryd()
		if err := n.StartGantryd(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-pulled; err != nil {
		t.Fatal(err)
	}
	t.Logf("killed when %v bytes were sent; %d pulls failed", moments, failed)
	if failed < len(moments) {
		t.Errorf("%d pulls failed for %d kills", failed, len(moments))
	}
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	checkSent(t, f, im, 1.05)
}

// TestFailedPullKeepsLayers has a pull fail for one layer after another one was complete. containerd collects what the
// failed pull left; a retry within transfer.keep_partial fetches no byte of the complete layer again all the same.
func TestFailedPullKeepsLayers(t *testing.T) {
	im := random(t, 34, 40, 20)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	f.SetRule(func(r *http.Request) *harness.Fault {
		if !isOf(r, im.Layers[0].Digest) {
			return nil
		}
		for f.SentBlob(im.Layers[1].Digest) < im.Layers[1].Size && r.Context().Err() == nil {
			time.Sleep(10 * time.Millisecond)
		}
		return &harness.Fault{Latency: 2 * time.Second, Status: http.StatusNotFound}
	})
	if _, err := n.Pull(t.Context(), "default", ref); err == nil {
		t.Fatal("the pull succeeded without a layer")
	}
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.SetRule(nil)
	mustPull(t, n, "default", ref)
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	checkSent(t, f, im, 1.01)
}
