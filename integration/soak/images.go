package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// kind is one image. Each client pulls it under a name of its own: they share its content, and nobody removes what
// another one is about to run.
type kind struct {
	name  string
	image *harness.Image
	refs  []string // by client
	sum   string   // what the helper's sum of /data prints, by containerd's own unpacking
}

// buildKinds makes the images and has the registry serve them.
func buildKinds(ctx context.Context, dir string, seed uint64, clients int, registry *harness.FaultRegistry) ([]*kind, error) {
	helper, err := harness.BuildHelper(ctx, dir)
	if err != nil {
		return nil, err
	}
	var kinds []*kind
	for _, s := range specs(helper, seed) {
		k := &kind{name: s.name}
		if k.image, err = harness.Build(ctx, filepath.Join(dir, "image-"+s.name), s.spec); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		if k.sum, err = oracle(ctx, filepath.Join(dir, "oracle"), s.spec); err != nil {
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
		for i := range clients {
			k.refs = append(k.refs, registry.AddImage(k.image, "soak/"+s.name, fmt.Sprint("c", i)))
		}
		kinds = append(kinds, k)
	}
	return kinds, nil
}

type namedSpec struct {
	name string
	spec harness.ImageSpec
}

func specs(helper string, seed uint64) []namedSpec {
	layer := func(t harness.TarFunc, c harness.Compression) harness.LayerSpec {
		return harness.LayerSpec{Tar: t, Compression: c}
	}
	noise := func(name string, n uint64, size int64, files int) harness.TarFunc {
		return harness.Noise("data/"+name, seed*100+n, size, files)
	}
	base := layer(harness.HelperTar(helper), harness.Gzip)
	shared := layer(noise("shared", 1, 3<<20, 40), harness.Gzip)
	many := []harness.LayerSpec{base}
	for i := range 40 {
		entries := []harness.Entry{
			harness.File(fmt.Sprintf("data/own/%d/file", i), fmt.Sprintf("%d of %d", i, seed)),
			harness.File("data/last", fmt.Sprint("layer ", i)),
			harness.File(fmt.Sprintf("data/gone/%d", i), "not for long"),
		}
		if i > 0 {
			entries = append(entries, harness.File(fmt.Sprintf("data/gone/.wh.%d", i-1), ""))
		}
		many = append(many, layer(harness.Entries(entries...), harness.Gzip))
	}
	all := []namedSpec{
		{"shared-a", harness.ImageSpec{Layers: []harness.LayerSpec{base, shared, layer(noise("a", 2, 1<<20, 10), harness.Gzip)}}},
		{"shared-b", harness.ImageSpec{Layers: []harness.LayerSpec{base, shared, layer(noise("b", 3, 1<<20, 300), harness.GzipGo)}, Docker: true}},
		{"many", harness.ImageSpec{Layers: many}},
		{"large", harness.ImageSpec{Layers: []harness.LayerSpec{base, layer(noise("large", 4, 40<<20, 8), harness.GzipFast)}}},
		{"zstd", harness.ImageSpec{Layers: []harness.LayerSpec{
			layer(harness.HelperTar(helper), harness.Zstd), layer(noise("zstd", 5, 6<<20, 60), harness.Zstd),
			layer(noise("plain", 6, 1<<20, 5), harness.Uncompressed),
		}}},
	}
	for i := range all {
		all[i].spec.Config = ocispec.ImageConfig{Cmd: []string{"/helper", "sum", "/data"}}
	}
	return all
}

// oracle unpacks the layers with containerd's own package, one over the other, and has the helper sum up /data in it.
func oracle(ctx context.Context, dir string, spec harness.ImageSpec) (string, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	defer os.RemoveAll(dir)
	for _, l := range spec.Layers {
		tar, err := os.Create(dir + ".tar")
		if err != nil {
			return "", err
		}
		err = l.Tar(tar)
		if err == nil {
			_, err = tar.Seek(0, 0)
		}
		if err == nil {
			_, err = archive.Apply(ctx, dir, tar)
		}
		_ = tar.Close()
		_ = os.Remove(tar.Name())
		if err != nil {
			return "", err
		}
	}
	return sumIn(ctx, dir)
}

// sumIn runs the helper of a root file system in it.
func sumIn(ctx context.Context, root string) (string, error) {
	cmd := exec.CommandContext(ctx, "/helper", "sum", "/data")
	cmd.Path, cmd.Dir = "/helper", "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("sum of %s: %w", root, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// sumOf mounts what a snapshot gave and sums it up.
func sumOf(ctx context.Context, mounts []mount.Mount) (sum string, err error) {
	err = mount.WithTempMount(ctx, mounts, func(root string) (err error) {
		sum, err = sumIn(ctx, root)
		return err
	})
	return sum, err
}
