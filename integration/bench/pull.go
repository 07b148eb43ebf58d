package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/gantryd/gantry/integration/harness"
)

// pull is what `ctr image pull` takes for an image of Go's own distribution.
func (b *bench) pull(ctx context.Context) (err error) {
	registry, err := harness.StartRegistry(ctx, filepath.Join(b.dir, "registry"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	spec, err := harness.GorootSpec(ctx, b.dir)
	if err != nil {
		return err
	}
	im, err := harness.Build(ctx, filepath.Join(b.dir, "image"), spec)
	if err != nil {
		return err
	}
	if _, err := im.Push(ctx, registry.Host(), "goroot", "bench"); err != nil {
		return err
	}
	fmt.Printf("image of GOROOT: %d layers, %.1f MiB compressed\n", len(im.Layers), float64(im.Size())/(1<<20))
	_, err = b.compare(ctx, contest{host: registry.Host(), ref: registry.Host() + "/goroot:bench", registry: []int{registry.PID()}, kinds: []kind{gantry, overlayfs}, gib: 4})
	return err
}
