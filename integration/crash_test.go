package integration

import (
	"context"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/harness"
)

// TestKillInTheMiddle kills gantryd during a pull, with a container running:
// the container reads on, the pull fails, gantryd comes back and the same pull
// succeeds without fetching everything again.
func TestKillInTheMiddle(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	_, running := push(t, r, p.Host(), "running", small(4, 4<<20))
	im, ref := push(t, r, p.Host(), "killed", small(5, 96<<20))
	mustPull(t, n, "default", running)
	if err := n.RunDetached(t.Context(), "default", running, "steady", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	sum := mustExec(t, n, "steady", "/helper", "sum", "/noise")
	big := im.Layers[2]

	p.Forget()
	p.SetRule(func(*http.Request) *harness.Fault { return &harness.Fault{BytesPerSecond: 8 << 20} })
	pulled := make(chan error, 1)
	go func() {
		_, err := n.Pull(t.Context(), "default", ref)
		pulled <- err
	}()
	waitSent(t, p, big.Digest, big.Size/2, pulled)
	n.KillGantryd()
	if err := <-pulled; err == nil {
		t.Error("the pull succeeded although gantryd was killed in the middle of it")
	}
	if got := mustExec(t, n, "steady", "/helper", "sum", "/noise"); got != sum {
		t.Errorf("without gantryd the container reads %s, want %s", got, sum)
	}
	p.SetRule(nil)
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	untilServed(t, n, ref)
	checkImage(t, n, "default", ref)
	mustRun(t, n, "default", ref, "5", "/helper", "cat", "/etc/seed")
	if got := mustExec(t, n, "steady", "/helper", "sum", "/noise"); got != sum {
		t.Errorf("after the restart the container reads %s, want %s", got, sum)
	}
	// What was on disk counts; lost are at most the blocks under way on each connection.
	if sent := p.BlobBytes()[big.Digest][harness.Gantry]; sent > big.Size*5/4 {
		t.Errorf("%d bytes of the layer's %d were sent in all: the pull did not resume", sent, big.Size)
	}
}

// waitSent waits until n bytes of the blob have left the proxy, or the pull has ended, which is a failure.
func waitSent(t *testing.T, p *harness.Proxy, dgst digest.Digest, n int64, pulled <-chan error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		sent := sentOf(p, dgst)
		if sent >= n {
			return
		}
		select {
		case err := <-pulled:
			t.Fatalf("the pull ended (%v) when %d of %d bytes were sent", err, sent, n)
		case <-ctx.Done():
			t.Fatalf("%d of %d bytes were sent: %v", sent, n, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// sentOf sums up what all clients were sent of a blob.
func sentOf(p *harness.Proxy, dgst digest.Digest) int64 {
	var sent int64
	for _, bytes := range p.BlobBytes()[dgst] {
		sent += bytes
	}
	return sent
}

func mustExec(t *testing.T, n *harness.Node, id string, args ...string) string {
	t.Helper()
	out, err := n.Exec(t.Context(), "default", id, args...)
	if err != nil {
		t.Fatalf("exec: %v", err)
	}
	return strings.TrimSpace(out)
}

// TestContainerdRestart stops containerd and starts it again: images, containers and mounts are as before.
func TestContainerdRestart(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "restart", small(6, 4<<20))
	mustPull(t, n, "default", ref)
	if err := n.RunDetached(t.Context(), "default", ref, "steady", "/helper", "sleep", "600"); err != nil {
		t.Fatal(err)
	}
	sum := mustExec(t, n, "steady", "/helper", "sum", "/noise")
	if err := n.Containerd().Stop(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := mustExec(t, n, "steady", "/helper", "sum", "/noise"); got != sum {
		t.Errorf("after the restart the container reads %s, want %s", got, sum)
	}
	checkImage(t, n, "default", ref)
	mustRun(t, n, "default", ref, "6", "/helper", "cat", "/etc/seed")
}
