package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/image-spec/identity"

	"github.com/gantryd/gantry/integration/harness"
)

// ctrDo runs ctr and wants it to succeed.
func ctrDo(t *testing.T, n *harness.Node, args ...string) string {
	t.Helper()
	out, err := n.Ctr(t.Context(), "default", args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wantOutput wants every part in what ctr printed.
func wantOutput(t *testing.T, what, out string, parts ...string) {
	t.Helper()
	for _, p := range parts {
		if !strings.Contains(out, p) {
			t.Errorf("ctr %s: no %q in\n%s", what, p, out)
		}
	}
}

// TestCtrContent is what ctr does with content alone: fetch, get, list, edit labels, ingest and remove.
func TestCtrContent(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "content", small(100, 2<<20))
	layer := im.Layers[2].Digest.String()
	ctrDo(t, n, "content", "fetch", "--plain-http", ref)
	blob := ctrDo(t, n, "content", "get", layer)
	want, err := os.ReadFile(filepath.Join(im.Dir(), im.Layers[2].Digest.Encoded()))
	if err != nil || blob != string(want) {
		t.Errorf("content get: %d bytes (%v), want %d", len(blob), err, len(want))
	}
	wantOutput(t, "content ls", ctrDo(t, n, "content", "ls"), layer, im.Config.Digest.String(), im.Manifest.Digest.String())
	wantOutput(t, "content label", ctrDo(t, n, "content", "label", layer, "colour=blue"), "colour=blue")
	wantOutput(t, "content ls", ctrDo(t, n, "content", "ls", "labels.colour==blue"), layer)
	if out := ctrDo(t, n, "content", "active"); strings.Contains(out, "layer") {
		t.Errorf("content active: %s, want nothing under way", out)
	}
	ctrDo(t, n, "content", "fetch-blob", "--plain-http", ref, layer)
	cmd, err := n.CtrCommand(t.Context(), "default", "content", "ingest", "--expected-size", "5", "written")
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdin = strings.NewReader("hello")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("content ingest: %v: %s", err, out)
	}
	const hello = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	if out := ctrDo(t, n, "content", "get", hello); out != "hello" {
		t.Errorf("what was ingested is %q", out)
	}
	ctrDo(t, n, "content", "rm", hello)
	if out, err := n.Ctr(t.Context(), "default", "content", "get", hello); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("what was removed: %q, %v", out, err)
	}
	wantOutput(t, "content prune", ctrDo(t, n, "content", "prune", "references", "--dry"), "")
}

// TestCtrImages is what ctr does with images: usage, tag, label, inspect, mount to read and to write, convert.
func TestCtrImages(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "images", small(101, 2<<20))
	mustPull(t, n, "default", ref)
	wantOutput(t, "image ls", ctrDo(t, n, "image", "ls"), ref)
	wantOutput(t, "image usage", ctrDo(t, n, "image", "usage", "--snapshotter", n.Snapshotter, ref), "iB")
	wantOutput(t, "image inspect", ctrDo(t, n, "image", "inspect", ref), "application/vnd.oci.image.manifest.v1+json")
	ctrDo(t, n, "image", "tag", ref, "example.com/tagged:1")
	wantOutput(t, "image label", ctrDo(t, n, "image", "label", ref, "who=me"), "who=me")

	for _, rw := range []bool{false, true} {
		target := t.TempDir()
		args := []string{"image", "mount", "--snapshotter", n.Snapshotter}
		if rw {
			args = append(args, "--rw")
		}
		ctrDo(t, n, append(args, "example.com/tagged:1", target)...)
		if got, err := os.ReadFile(filepath.Join(target, "etc", "link")); err != nil || string(got) != "101" {
			t.Errorf("mounted with rw=%t: %q, %v", rw, got, err)
		}
		if err := os.WriteFile(filepath.Join(target, "etc", "seed"), nil, 0o600); (err == nil) != rw {
			t.Errorf("mounted with rw=%t: writing says %v", rw, err)
		}
		ctrDo(t, n, "image", "unmount", "--snapshotter", n.Snapshotter, "--rm", target)
	}

	// Uncompressed layers are other blobs of the same DiffIDs: nothing is unpacked anew.
	var before []string
	if n.Snapshotter == harness.Gantry {
		before = layerFiles(t, n)
	}
	ctrDo(t, n, "image", "convert", "--oci", "--uncompress", ref, "example.com/converted:1")
	mustRun(t, n, "default", "example.com/converted:1", "101", "/helper", "cat", "/etc/link")
	if n.Snapshotter == harness.Gantry {
		if after := layerFiles(t, n); strings.Join(before, "\n") != strings.Join(after, "\n") {
			t.Errorf("layer files before: %q, after: %q", before, after)
		}
	}
	target := r.Host() + "/converted:1"
	ctrDo(t, n, "image", "push", "--plain-http", target, "example.com/converted:1")
	ctrDo(t, n, "image", "rm", "--sync", "example.com/converted:1", "example.com/tagged:1", ref)
	if err := n.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	mustPull(t, n, "default", target)
	mustRun(t, n, "default", target, "101", "/helper", "cat", "/etc/link")
}

// TestCtrSnapshots is what ctr does with snapshots: unpack, tree, info, usage, view, prepare, commit, diff, label, remove.
func TestCtrSnapshots(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "snapshots", small(102, 2<<20))
	ctrDo(t, n, "content", "fetch", "--plain-http", ref)
	snapshot := func(args ...string) string {
		t.Helper()
		return ctrDo(t, n, append([]string{"snapshots", "--snapshotter", n.Snapshotter}, args...)...)
	}
	chain := identity.ChainID(im.DiffIDs).String()
	wantOutput(t, "unpack", snapshot("unpack", im.Manifest.Digest.String()), "done")
	wantOutput(t, "ls", snapshot("ls"), chain, "Committed")
	wantOutput(t, "tree", snapshot("tree"), chain)
	wantOutput(t, "info", snapshot("info", chain), `"Kind": "Committed"`)
	wantOutput(t, "usage", snapshot("usage", chain), "iB")

	wantOutput(t, "view", snapshot("view", "--mounts", "looking", chain), "overlay")
	dir := t.TempDir()
	wantOutput(t, "prepare", snapshot("prepare", "--target", dir, "working", chain), dir)
	wantOutput(t, "mounts", snapshot("mounts", dir, "working"), "upperdir=")
	inRootfsOf(t, n, "working", func(root string) error {
		return os.WriteFile(filepath.Join(root, "etc", "added"), []byte("more"), 0o600)
	})
	if out := snapshot("diff", "--keep", "working"); len(out) < 100 {
		t.Errorf("diff of an active snapshot: %d bytes", len(out))
	}
	snapshot("commit", "worked", "working")
	wantOutput(t, "label", snapshot("label", "worked", "who=me"), "")
	wantOutput(t, "info", snapshot("info", "worked"), `"who": "me"`, chain)
	if out := snapshot("diff", "worked"); len(out) < 100 {
		t.Errorf("diff of a committed snapshot: %d bytes", len(out))
	}
	wantOutput(t, "prepare", snapshot("prepare", "--mounts", "on-top", "worked"), "overlay")
	inRootfsOf(t, n, "on-top", func(root string) error {
		got, err := os.ReadFile(filepath.Join(root, "etc", "added"))
		if string(got) != "more" {
			t.Errorf("the committed file says %q", got)
		}
		return err
	})
	if _, err := n.Ctr(t.Context(), "default", "snapshots", "--snapshotter", n.Snapshotter, "rm", "worked"); err == nil {
		t.Error("a snapshot with a child was removed")
	}
	snapshot("rm", "on-top", "worked") // nothing holds the view: garbage collection takes it
}

func inRootfsOf(t *testing.T, n *harness.Node, key string, fn func(root string) error) {
	t.Helper()
	ctx, client := clientOf(t, n, "default")
	inRootfs(ctx, t, n, client, key, fn)
}

// TestCtrDiscarded reads, converts and removes an image whose compressed layers are not kept.
func TestCtrDiscarded(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{GantryExtra: discarding})
	im, ref := push(t, r, p.Host(), "discarded", small(103, 2<<20))
	mustPull(t, n, "default", ref)
	wantDiscarded(t, n, im)
	for _, l := range im.Layers {
		want, err := os.ReadFile(filepath.Join(im.Dir(), l.Digest.Encoded()))
		if got := ctrDo(t, n, "content", "get", l.Digest.String()); err != nil || got != string(want) {
			t.Errorf("content get: %d bytes (%v), want %d", len(got), err, len(want))
		}
	}
	ctrDo(t, n, "image", "convert", "--oci", "--uncompress", ref, "example.com/converted:1")
	mustRun(t, n, "default", "example.com/converted:1", "103", "/helper", "cat", "/etc/link")
	mustPull(t, n, "default", ref, "--snapshotter", harness.Overlayfs) // which needs the compressed layers
	ctrDo(t, n, "image", "rm", "--sync", "example.com/converted:1", ref)
	checkEmpty(t, n)
}
