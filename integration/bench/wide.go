package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// The network of the wide scenario: one connection is a tenth of it.
const (
	perConnection = 25_000_000  // bytes a second
	together      = 250_000_000 // bytes a second
	latency       = 20 * time.Millisecond
)

// wide is what a large image takes where one connection gets a tenth of what the
// network has: most object stores and load balancers.
func (b *bench) wide(ctx context.Context) (err error) {
	registry, err := harness.StartFaultRegistry(ctx, harness.FaultOptions{PerConnection: perConnection, Total: together, Latency: latency})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	spec, err := harness.GorootSpec(ctx, b.dir)
	if err != nil {
		return err
	}
	for i := range 3 {
		spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Random("model", uint64(i), 280_000_000, 4)})
	}
	im, err := harness.Build(ctx, filepath.Join(b.dir, "image"), spec)
	if err != nil {
		return err
	}
	registry.AddImage(im, "wide", "bench")
	fmt.Printf("image: %d layers, %.2f GB compressed; %d MB/s a connection, %d MB/s together, %s\n",
		len(im.Layers), float64(im.Size())/1e9, perConnection/1_000_000, together/1_000_000, latency)
	m, err := b.compare(ctx, contest{host: registry.Host(), ref: registry.Host() + "/wide:bench", kinds: []kind{gantry, overlayfs}, gib: 8})
	if err != nil {
		return err
	}
	least := time.Duration(float64(im.Size()) / together * float64(time.Second))
	fmt.Printf("the network needs %.2fs: gantry %.2f times that, overlayfs %.2f times\n",
		least.Seconds(), m[gantry.name].Seconds()/least.Seconds(), m[overlayfs.name].Seconds()/least.Seconds())
	return nil
}
