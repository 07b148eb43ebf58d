package integration

import (
	"context"
	"runtime"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// foreign is a platform that no test runs on.
const foreign = "linux/s390x"

// multi pushes an image for this platform and another one, as one index.
func multi(t *testing.T, r *harness.Registry) (ref string, manifests []ocispec.Descriptor) {
	t.Helper()
	n := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	ctx, client := clientOf(t, n, "default")
	ctx, done, err := client.WithLease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := done(context.WithoutCancel(ctx)); err != nil {
			t.Error(err)
		}
	}()
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	for i, name := range []string{platforms.DefaultString(), foreign} {
		platform := platforms.MustParse(name)
		spec := small(uint64(110+i), 2<<20)
		spec.Edit = func(_ *ocispec.Manifest, c *ocispec.Image) { c.Platform = platform }
		im, ref := push(t, r, r.Host(), "multi", spec)
		fetched, err := client.Fetch(ctx, ref, containerd.WithResolver(plain()), containerd.WithPlatform(name))
		if err != nil {
			t.Fatal(err)
		}
		fetched.Target.Platform = &platform
		index.Manifests = append(index.Manifests, fetched.Target)
		manifests = append(manifests, im.Manifest)
	}
	ref = r.Host() + "/multi:all"
	desc := writeJSON(ctx, t, client, ocispec.MediaTypeImageIndex, index, map[string]string{})
	if err := client.Push(ctx, ref, desc, containerd.WithResolver(plain()), containerd.WithPlatformMatcher(platforms.All)); err != nil {
		t.Fatal(err)
	}
	return ref, manifests
}

// TestPlatforms pulls an index for this platform, for another one and for all, and passes all of it on.
func TestPlatforms(t *testing.T) {
	r := newRegistry(t)
	ref, manifests := multi(t, r)
	n := newNode(t, harness.Options{})
	if err := n.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	mustPull(t, n, "one", ref)
	mustRun(t, n, "one", ref, "110", "/helper", "cat", "/etc/link")
	mustPull(t, n, "foreign", ref, "--platform", foreign, "--local")
	mustPull(t, n, "all", ref, "--local", "--all-platforms")
	mustRun(t, n, "all", ref, "110", "/helper", "cat", "/etc/link")

	ctx, client := clientOf(t, n, "all")
	im, err := client.GetImage(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range []string{platforms.DefaultString(), foreign} {
		m := platforms.OnlyStrict(platforms.MustParse(name))
		available, _, _, missing, err := images.Check(ctx, client.ContentStore(), im.Target(), m)
		if err != nil || !available || len(missing) > 0 {
			t.Errorf("%s: available %t, missing %v, %v", name, available, missing, err)
		}
		// Another platform's layers are looked at, not run.
		other := containerd.NewImageWithPlatform(client, im.Metadata(), m)
		if err := other.Unpack(ctx, n.Snapshotter); err != nil {
			t.Errorf("unpack %s: %v", name, err)
		}
		got, err := images.Manifest(ctx, client.ContentStore(), im.Target(), m)
		if err != nil || got.Config.Digest == "" {
			t.Errorf("%s: %v, want %s", name, err, manifests[i].Digest)
		}
	}
	target := r.Host() + "/again:all"
	if err := client.Push(ctx, target, im.Target(), containerd.WithResolver(plain()), containerd.WithPlatformMatcher(platforms.All)); err != nil {
		t.Errorf("push all platforms: %v", err)
	}
	mustPull(t, n, "again", target)
	mustRun(t, n, "again", target, "110", "/helper", "cat", "/etc/link")
	if runtime.GOARCH == strings.TrimPrefix(foreign, "linux/") {
		t.Errorf("the test needs a platform other than %s", foreign)
	}
}

// TestForeignPlatform wants what containerd answers with overlayfs to a pull that unpacks what is for another platform.
func TestForeignPlatform(t *testing.T) {
	r := newRegistry(t)
	ref, _ := multi(t, r)
	said := map[string]string{}
	for _, kind := range []string{harness.Overlayfs, snapshotter} {
		n := newNode(t, harness.Options{Snapshotter: kind})
		if err := n.AddRegistry("http", r.Host()); err != nil {
			t.Fatal(err)
		}
		_, err := n.Pull(t.Context(), "default", ref, "--platform", foreign)
		out, err2 := n.Ctr(t.Context(), "default", "image", "check", "--snapshotter", kind)
		t.Logf("%s: %v\n%s %v", kind, err, out, err2)
		if err != nil {
			said[kind] = err.Error()
		}
	}
	if (said[harness.Overlayfs] == "") != (said[snapshotter] == "") {
		t.Errorf("with overlayfs %q, with %s %q", said[harness.Overlayfs], snapshotter, said[snapshotter])
	}
}

// TestSideBySide has one image unpacked for gantry and for overlayfs on one node, in both orders, and each alone go.
func TestSideBySide(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	for i, order := range [][]string{{harness.Gantry, harness.Overlayfs}, {harness.Overlayfs, harness.Gantry}} {
		for j, args := range [][]string{nil, {"--local"}} {
			_, ref := push(t, r, p.Host(), "sides", small(uint64(120+2*i+j), 2<<20))
			for _, kind := range order {
				if _, err := n.Ctr(t.Context(), "default", append(append([]string{"image", "pull", "--snapshotter", kind}, args...), ref)...); err != nil {
					t.Fatalf("%v %v: pull for %s: %v", order, args, kind, err)
				}
			}
			for _, kind := range order {
				out, err := n.Ctr(t.Context(), "default", "run", "--rm", "--snapshotter", kind, "--net-host", "--runc-root", n.Dir+"/runc", ref, "side-"+kind, "/helper", "cat", "/noise/001")
				if err != nil || len(out) == 0 {
					t.Errorf("%v %v: run on %s: %d bytes, %v", order, args, kind, len(out), err)
				}
			}
			if err := n.RemoveImage(t.Context(), "default", ref); err != nil {
				t.Fatal(err)
			}
		}
	}
	checkEmpty(t, n)
}
