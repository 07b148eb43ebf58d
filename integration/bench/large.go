package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/klauspost/compress/gzip"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// The images' names in the cache: they change when what they are made of does.
const (
	largeName  = "large-v3"
	storedName = "stored-v1"
	smallName  = "small-v2"
)

// large is what an image takes most of which was compressed before.
func (b *bench) large(ctx context.Context) error { return b.mostlyPacked(ctx, largeName, largeSpec()) }

// stored is large with bytes that gzip can do nothing with: it stores them, and inflating is copying.
func (b *bench) stored(ctx context.Context) error {
	return b.mostlyPacked(ctx, storedName, storedSpec())
}

func (b *bench) mostlyPacked(ctx context.Context, name string, spec harness.ImageSpec) error {
	m, err := b.served(ctx, name, spec)
	if err != nil {
		return err
	}
	m.faster(overlayfs, 4)
	m.faster(erofs, 2)
	m.within(skopeo, 1.1)
	return nil
}

// small is what an image of many small files takes.
func (b *bench) small(ctx context.Context) error {
	m, err := b.served(ctx, smallName, smallSpec())
	if err != nil {
		return err
	}
	m.faster(overlayfs, 6)
	return nil
}

// largeSpec is an image of about 1 GB compressed in three layers: 0.8 GB of zip and gzip archives, and twice 0.44 GB of source
// code in small files. All are packed by Go's own gzip, with which BuildKit and containerd pack layers.
func largeSpec() harness.ImageSpec {
	return harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: harness.Sources("usr", 11, 440e6, 13_000), Compression: harness.GzipGo},
		{Tar: harness.Archives("wheels", 12, 800e6), Compression: harness.GzipGo},
		{Tar: harness.Sources("opt", 13, 440e6, 13_000), Compression: harness.GzipGo},
	}}
}

// storedSpec is the same with 0.8 GB of random bytes, all of whose deflate blocks are stored ones: encrypted data, or what
// was packed by xz.
func storedSpec() harness.ImageSpec {
	return harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: harness.Sources("usr", 11, 440e6, 13_000)},
		{Tar: harness.Random("model", 12, 800e6, 8)},
		{Tar: harness.Sources("opt", 13, 440e6, 13_000)},
	}}
}

// smallSpec is an image of 86,000 files of source code, 0.7 GB compressed, in three layers, one of
// which has more than half of them, as an application's dependencies have.
func smallSpec() harness.ImageSpec {
	return harness.ImageSpec{Layers: []harness.LayerSpec{
		{Tar: harness.Sources("usr", 21, 640e6, 20_000)},
		{Tar: harness.Sources("opt/dependencies", 22, 1_680e6, 52_000)},
		{Tar: harness.Sources("opt/application", 23, 480e6, 14_000)},
	}}
}

// served compares all kinds on an image in an uncapped distribution registry.
func (b *bench) served(ctx context.Context, name string, spec harness.ImageSpec) (_ medians, err error) {
	im, err := harness.BuildCached(ctx, name, spec)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, "registry")
	registry, err := harness.StartRegistry(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	ref, err := im.Push(ctx, registry.Host(), name, "bench")
	if err != nil {
		return nil, err
	}
	fmt.Printf("image: %d layers, %.2f GB compressed\n", len(im.Layers), float64(im.Size())/1e9)
	if err := describeLargest(im); err != nil {
		return nil, err
	}
	return b.compare(ctx, contest{host: registry.Host(), ref: ref, registry: []int{registry.PID()}, kinds: everybody, gib: 8, warm: filepath.Join(dir, "data")})
}

// describeLargest prints what gzip made of the largest layer, and how fast the package that containerd unpacks gzip with does so,
// on one core: several GB/s if its blocks are stored ones, a tenth of that if they are coded.
func describeLargest(im *harness.Image) error {
	l := slices.MaxFunc(im.Layers, func(a, b ocispec.Descriptor) int { return cmp.Compare(a.Size, b.Size) })
	f, err := os.Open(filepath.Join(im.Dir(), l.Digest.Encoded()))
	if err != nil {
		return err
	}
	defer f.Close()
	begin := time.Now()
	r, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	size, err := io.Copy(io.Discard, r)
	if err != nil {
		return err
	}
	fmt.Printf("the largest layer: %.2f GB, of which gzip saved %.2f %%; klauspost/compress, as containerd uses it, unpacks it at %.0f MB/s\n",
		float64(size)/1e9, 100*(1-float64(l.Size)/float64(size)), float64(size)/1e6/time.Since(begin).Seconds())
	return nil
}
