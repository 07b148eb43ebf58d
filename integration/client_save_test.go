package integration

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images/archive"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/harness"
)

// TestClientSaveLoad is `nerdctl save` of two images that share layers, and `nerdctl load` on another node, where no
// registry is known. Digests stay as they are.
func TestClientSaveLoad(t *testing.T) {
	n, r, p := setup(t, harness.Options{})
	other := newNode(t, harness.Options{})
	ctx, client := clientOf(t, n, "default")
	var refs []string
	var all []*harness.Image
	opts := []archive.ExportOpt{archive.WithPlatform(platforms.Default()), archive.WithSkipMissing(client.ContentStore())}
	for i := range 2 {
		im, ref := push(t, r, p.Host(), fmt.Sprint("saved", i), small(uint64(74+i), 4<<20))
		clientPull(ctx, t, client, ref, containerd.WithPullUnpack)
		refs, all = append(refs, ref), append(all, im)
		opts = append(opts, archive.WithImage(client.ImageService(), ref))
	}
	var saved bytes.Buffer
	if err := client.Export(ctx, &saved, opts...); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*harness.Node{n, other} {
		ctx, client := clientOf(t, n, "loaded")
		loaded, err := client.Import(ctx, bytes.NewReader(saved.Bytes()), containerd.WithImportPlatform(platforms.Default()))
		if err != nil || len(loaded) != 2 {
			t.Fatalf("import: %v, %v", loaded, err)
		}
		for i, ref := range refs {
			image, err := client.GetImage(ctx, ref)
			if err != nil || image.Target().Digest != all[i].Manifest.Digest {
				t.Fatalf("image %s: %v, %v, want %s", ref, image, err, all[i].Manifest.Digest)
			}
			if err := image.Unpack(ctx, n.Snapshotter); err != nil {
				t.Fatal(err)
			}
			c := newContainer(ctx, t, n, client, image, fmt.Sprint("c", i))
			if got, want := runTask(ctx, t, c), fmt.Sprint(74+i); got != want {
				t.Errorf("printed %q, want %s", got, want)
			}
			removeContainer(ctx, t, c)
		}
	}
}

// TestClientLoadsDockerSave imports what docker saved before it knew OCI: uncompressed layers, a manifest.json.
func TestClientLoadsDockerSave(t *testing.T) {
	n := newNode(t, harness.Options{})
	ctx, client := clientOf(t, n, "default")
	var layers []harness.Entry
	var diffIDs []digest.Digest
	var names []string
	for i, l := range small(76, 1<<20).Layers {
		var b bytes.Buffer
		if err := l.Tar(&b); err != nil {
			t.Fatal(err)
		}
		names = append(names, fmt.Sprintf("%064d/layer.tar", i))
		diffIDs = append(diffIDs, digest.FromBytes(b.Bytes()))
		layers = append(layers, harness.File(names[i], b.String()))
	}
	config, err := json.Marshal(map[string]any{
		"architecture": platforms.DefaultSpec().Architecture, "os": "linux", "config": map[string]any{"Cmd": []string{"/helper", "cat", "/etc/seed"}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs},
	})
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "RepoTags": []string{"example.com/docker:save"}, "Layers": names}})
	if err != nil {
		t.Fatal(err)
	}
	for name, opts := range map[string][]containerd.ImportOpt{"plain": nil, "compressed": {containerd.WithImportCompression()}} {
		t.Run(name, func(t *testing.T) {
			ctx := namespaces.WithNamespace(ctx, name)
			var archived bytes.Buffer
			entries := append(slices.Clone(layers), harness.File("config.json", string(config)), harness.File("manifest.json", string(manifest)))
			if err := harness.Entries(entries...)(&archived); err != nil {
				t.Fatal(err)
			}
			if _, err := client.Import(ctx, &archived, opts...); err != nil {
				t.Fatal(err)
			}
			image, err := client.GetImage(ctx, "example.com/docker:save")
			if err != nil {
				t.Fatal(err)
			}
			if err := image.Unpack(ctx, n.Snapshotter); err != nil {
				t.Fatal(err)
			}
			c := newContainer(ctx, t, n, client, image, "c")
			if got := runTask(ctx, t, c); got != "76" {
				t.Errorf("printed %q, want 76", got)
			}
			removeContainer(ctx, t, c)
		})
	}
}

// TestClientUsage is what `nerdctl images`, `nerdctl ps -s` and `nerdctl system df` add up, held against overlayfs.
func TestClientUsage(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	_, ref := push(t, r, r.Host(), "usage", small(78, 8<<20))
	const wrote = 3 << 20
	used := map[string][2]snapshots.Usage{} // the image's layers, the container's
	for _, kind := range []string{harness.Gantry, harness.Overlayfs} {
		n := newNode(t, harness.Options{Snapshotter: kind})
		if kind == harness.Gantry {
			if err := n.AddRegistry("http", r.Host()); err != nil {
				t.Fatal(err)
			}
		}
		ctx, client := clientOf(t, n, "default")
		im := clientPull(ctx, t, client, ref, containerd.WithPullUnpack, containerd.WithPullSnapshotter(kind))
		c := newContainer(ctx, t, n, client, im, "c", "/helper", "fill", "/tmp/big", fmt.Sprint(wrote))
		runTask(ctx, t, c)
		var both [2]snapshots.Usage
		s := client.SnapshotService(kind)
		if err := s.Walk(ctx, func(ctx context.Context, info snapshots.Info) error {
			u, err := s.Usage(ctx, info.Name)
			if info.Kind == snapshots.KindCommitted {
				both[0].Add(u)
			} else {
				both[1].Add(u)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		size, err := im.Usage(ctx, containerd.WithSnapshotUsage())
		if err != nil || size < both[0].Size {
			t.Errorf("%s: Image.Usage says %d (%v), its snapshots have %d", kind, size, err, both[0].Size)
		}
		used[kind] = both
		removeContainer(ctx, t, c)
	}
	t.Logf("the image's layers, the container's: gantry %+v, overlayfs %+v", used[harness.Gantry], used[harness.Overlayfs])
	ours, theirs := used[harness.Gantry], used[harness.Overlayfs]
	// A tar has half a KiB for each entry where a directory has a block for each file.
	if ours[0].Size < theirs[0].Size*8/10 || ours[0].Size > theirs[0].Size*11/10 {
		t.Errorf("the image's layers take %d bytes, with overlayfs %d", ours[0].Size, theirs[0].Size)
	}
	if ours[1].Size < wrote || ours[1].Size != theirs[1].Size || ours[1].Inodes != theirs[1].Inodes {
		t.Errorf("the container wrote %+v, with overlayfs %+v", ours[1], theirs[1])
	}
}
