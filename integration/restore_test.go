package integration

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/harness"
)

// reconfigure changes gantryd's file and starts it again.
func reconfigure(t *testing.T, n *harness.Node, old, replacement string) {
	t.Helper()
	path := filepath.Join(n.Dir, "gantry.toml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), old) {
		t.Fatalf("%s does not say %q", path, old)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), old, replacement, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Gantryd().Stop(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// content reads a blob as `ctr content get` does and returns its digest.
func getContent(t *testing.T, n *harness.Node, d digest.Digest) (digest.Digest, error) {
	t.Helper()
	out, err := n.Ctr(t.Context(), "default", "content", "get", d.String())
	return digest.NewDigestFromBytes(digest.SHA256, sum(out)), err
}

func sum(text string) []byte {
	h := sha256.Sum256([]byte(text))
	return h[:]
}

// A node that discards goes back to containerd's own store, in containerd's own folder: after `gantry content restore`
// that store, without gantry, reads every byte.
func TestRestore(t *testing.T) {
	needGantry(t)
	im := random(t, 71, 20, 30, 1)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{GantryExtra: discarding})
	content := filepath.Join(n.Dir, "containerd", "io.containerd.content.v1.content")
	reconfigure(t, n, discarding, fmt.Sprintf("%sroot = %q\n[transfer]\nroot = %q\n", discarding, content, filepath.Join(n.Dir, "containerd", "transfers")))
	mustPull(t, n, "default", ref)
	blob := func(d digest.Digest) string { return filepath.Join(content, "blobs", "sha256", d.Encoded()) }
	record := func(d digest.Digest) string { return filepath.Join(content, "discarded", "sha256", d.Encoded()) }
	for i, l := range im.Layers {
		if _, err := os.Stat(blob(l.Digest)); err == nil {
			t.Errorf("layer %d is there before it was restored", i)
		}
	}
	reconfigure(t, n, `"none"`, `"all"`)
	status, err := n.GantryCLI(t.Context(), "status")
	if err != nil || !strings.Contains(status, "3 layers are kept without their compressed bytes, 51.0 MiB") {
		t.Errorf("status says %s, %v", status, err)
	}

	// One layer cannot be had: the others come back, and the exit code says so.
	gone := im.Layers[1].Digest
	f.SetRule(func(r *http.Request) *harness.Fault {
		if isOf(r, gone) {
			return &harness.Fault{Status: http.StatusNotFound}
		}
		return nil
	})
	out, err := n.GantryCLI(t.Context(), "content", "restore")
	if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.ExitCode() != 1 {
		t.Fatalf("restore without a source: %v", err)
	}
	if !strings.Contains(out, "failed "+gone.String()) || !strings.Contains(out, f.Host()) || strings.Count(out, "restored sha256:") != 2 {
		t.Errorf("restore printed %s", out)
	}
	if !strings.Contains(err.Error(), "1 of 3 layers could not be fetched") {
		t.Errorf("restore says %v", err)
	}
	f.SetRule(nil)
	if out, err = n.GantryCLI(t.Context(), "content", "restore", "--json"); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(out, `"state":"restored","digest":"`+gone.String()) || strings.Count(out, "\n") != 2 {
		t.Errorf("restore of the rest printed %s", out)
	}
	if out, err = n.GantryCLI(t.Context(), "content", "restore"); err != nil || out != "no layer is discarded\n" {
		t.Errorf("restore of nothing printed %s, %v", out, err)
	}
	for i, l := range im.Layers {
		if _, err := os.Stat(record(l.Digest)); err == nil {
			t.Errorf("layer %d still has a record", i)
		}
	}

	// containerd's own store.
	switchGantry(t, n, false)
	for i, l := range im.Layers {
		if got, err := getContent(t, n, l.Digest); err != nil || got != l.Digest {
			t.Errorf("containerd reads layer %d as %s, %v", i, got, err)
		}
	}
	if err := n.StartGantryd(t.Context()); err != nil { // for Close, which stops it
		t.Fatal(err)
	}
}

// What cannot be fetched again says so, and what comes back otherwise is refused.
func TestDiscardedSource(t *testing.T) {
	needGantry(t)
	im := random(t, 72, 20)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{GantryExtra: discarding})
	mustPull(t, n, "default", ref)
	wantDiscarded(t, n, im)
	layer := im.Layers[0].Digest
	for name, rule := range map[string]harness.Rule{
		"gone":     func(r *http.Request) *harness.Fault { return &harness.Fault{Status: http.StatusNotFound} },
		"other":    flipAlways(layer, 1000),
		"other, 2": flipAlways(layer, 20<<20-1), // in the last chunk: what came before may be read
	} {
		f.SetRule(rule)
		got, err := getContent(t, n, layer)
		if err == nil {
			t.Fatalf("%s: it was read, as %s", name, got)
		}
		for _, word := range []string{layer.String(), f.Host(), "discarded", "remove the image and pull it from another one"} {
			if !strings.Contains(err.Error(), word) {
				t.Errorf("%s: %v does not say %q", name, err, word)
			}
		}
		if strings.HasPrefix(name, "other") && !strings.Contains(err.Error(), "other bytes came") && !strings.Contains(err.Error(), "digest mismatch") {
			t.Errorf("%s: %v", name, err)
		}
	}
	f.SetRule(nil)
	if got, err := getContent(t, n, layer); err != nil || got != layer {
		t.Errorf("once the registry is well it reads as %s, %v", got, err)
	}
}

// A gantryd that is killed in the middle of a pull begins those layers again, and nothing of the first try is left.
func TestKilledWhileDiscarding(t *testing.T) {
	needGantry(t)
	im := random(t, 73, 100, 60)
	f, n, ref := faulty(t, im, harness.FaultOptions{Total: 100_000_000}, harness.Options{GantryExtra: discarding})
	pulled := make(chan error, 1)
	go func() {
		_, err := n.Pull(t.Context(), "default", ref)
		pulled <- err
	}()
	until(t, pulled, func() bool { return f.Sent() > all(im)/2 })
	n.KillGantryd()
	if err := <-pulled; err == nil {
		t.Fatal("the pull succeeded")
	}
	if len(blobFiles(t, n)) > 2 {
		t.Errorf("after the kill blobs/ has %v", blobFiles(t, n))
	}
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	for try := 0; ; try++ {
		_, err := n.Pull(t.Context(), "default", ref)
		if err == nil {
			break
		}
		if try > 50 { // while containerd finds out that gantryd is back
			t.Fatal(err)
		}
	}
	wantDiscarded(t, n, im)
	if left := onDisk(t, filepath.Join(n.Dir, "gantry", "transfers")); left > 1<<20 {
		t.Errorf("%d bytes of transfers are left", left)
	}
	checkSent(t, f, im, 2)
	for i, l := range im.Layers {
		if got, err := getContent(t, n, l.Digest); err != nil || got != l.Digest {
			t.Errorf("layer %d reads as %s, %v", i, got, err)
		}
	}
}
