package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

const (
	startLayers = 10 // of the image whose containers are started
	startsRound = 10 // starts of each kind in a round
)

// start is how long `ctr run` takes for a container that ends at once, of an image of ten layers that is there
// already, with the page cache as it is and with an empty one. What containerd's own overlayfs and content store take
// behind a proxy is what the way to gantryd costs.
func (b *bench) start(ctx context.Context) (err error) {
	helper, err := harness.BuildHelper(ctx, b.dir)
	if err != nil {
		return err
	}
	spec := harness.ImageSpec{Layers: []harness.LayerSpec{{Tar: harness.HelperTar(helper)}}}
	for i := range uint64(startLayers - 1) {
		spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Sources(fmt.Sprint("usr/", i), 31+i, 8e6, 300)})
	}
	return b.beside(ctx, spec, []kind{gantry, overlayfs, proxied}, func(nodes []sideNode) error {
		for _, cold := range []bool{false, true} {
			name := "start"
			if cold {
				name = "start, empty page cache"
			}
			starts := 0
			err := b.duel(name, nodes, startsRound, func(n sideNode) (time.Duration, error) {
				if cold {
					if err := coldCache(""); err != nil {
						return 0, err
					}
				}
				starts++
				begin := time.Now()
				_, err := n.node.Run(ctx, "default", n.ref, fmt.Sprintf("c%d", starts), "/helper", "sleep", "0")
				return time.Since(begin), err
			}, 1)
			if err != nil {
				return err
			}
		}
		return b.steps(ctx, nodes)
	})
}

// sideNode is one of the nodes that have the same image on the same disk.
type sideNode struct {
	kind kind
	node *harness.Node
	im   *harness.Image
	ref  string
}

// beside gives nodes of these kinds, all on the machine's own disk, an image, and hands them to do.
func (b *bench) beside(ctx context.Context, spec harness.ImageSpec, kinds []kind, do func([]sideNode) error) (err error) {
	registry, err := harness.StartFaultRegistry(ctx, harness.FaultOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	im, err := harness.Build(ctx, filepath.Join(b.dir, "image"), spec)
	if err != nil {
		return err
	}
	ref := registry.AddImage(im, "beside", "bench")
	var nodes []sideNode
	for _, k := range kinds {
		n, err := b.node(ctx, k.node, registry.Host())
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.Close()) }()
		if _, err := n.Pull(ctx, "default", ref); err != nil {
			return err
		}
		nodes = append(nodes, sideNode{k, n, im, ref})
	}
	return do(nodes)
}

// duel measures in turns, each node so many times in a round, and prints medians, and whether gantry is at least so
// many times as fast as overlayfs.
func (b *bench) duel(name string, nodes []sideNode, times int, measure func(sideNode) (time.Duration, error), bound float64) error {
	took := map[string][]time.Duration{}
	for i := range b.rounds * times {
		for j := range nodes {
			n := nodes[(i+j)%len(nodes)] // who goes first changes
			d, err := measure(n)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", name, n.kind.name, err)
			}
			took[n.kind.name] = append(took[n.kind.name], d)
		}
	}
	ours := median(took[gantry.name]).Seconds()
	fmt.Printf("%-44s gantry %8.1f ms", name, ours*1e3)
	for _, n := range nodes {
		if n.kind.name != gantry.name {
			theirs := median(took[n.kind.name]).Seconds()
			fmt.Printf("  %s %8.1f ms  ratio %.2f", n.kind.name, theirs*1e3, theirs/ours)
		}
	}
	ratio := median(took[overlayfs.name]).Seconds() / ours
	fmt.Printf("  (medians of %d; bound %g: %s)\n", b.rounds*times, bound, held(ratio >= bound))
	return nil
}
