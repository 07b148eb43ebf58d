package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/gantryd/gantry/integration/harness"
)

// The images' names in the cache: they change when what they are made of does.
const (
	largeName = "large-v2"
	smallName = "small-v2"
)

// large is what an image takes most of which nothing compresses: a model, an archive.
func (b *bench) large(ctx context.Context) error {
	m, err := b.served(ctx, largeName, largeSpec())
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

// largeSpec is an image of about 1 GB compressed in three layers: 0.8 GB of what was compressed
// before, of which gzip makes stored blocks, and twice 0.44 GB of source code in small files.
func largeSpec() harness.ImageSpec {
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
	return b.compare(ctx, contest{host: registry.Host(), ref: ref, registry: []int{registry.PID()}, kinds: everybody, gib: 8, warm: filepath.Join(dir, "data")})
}
