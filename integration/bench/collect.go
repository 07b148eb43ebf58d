package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

// The gc scenario: how many pulls at once, and of what.
const (
	pullsAtOnce = 20
	manyFiles   = 100_000
)

// collect pulls twenty images at once and removes them while containerd collects garbage without a pause. It prints the
// longest calls as gantryd itself measures them, and the slowest collection beside one on containerd's overlayfs.
func (b *bench) collect(ctx context.Context) (err error) {
	registry, err := harness.StartFaultRegistry(ctx, harness.FaultOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	refs := make([]string, pullsAtOnce)
	for i := range refs {
		im, err := harness.Build(ctx, filepath.Join(b.dir, fmt.Sprint("image", i)), collectSpec(uint64(i)))
		if err != nil {
			return err
		}
		refs[i] = registry.AddImage(im, fmt.Sprint("gc", i), "bench")
	}
	for _, k := range []kind{gantry, overlayfs} {
		if len(b.kinds) > 0 && !slices.Contains(b.kinds, k.name) {
			continue
		}
		if err := b.collectOn(ctx, k, registry.Host(), refs); err != nil {
			return err
		}
	}
	return nil
}

// collectSpec is an image of many small layers, every tenth one of 100,000 files.
func collectSpec(seed uint64) harness.ImageSpec {
	var spec harness.ImageSpec
	for i := range uint64(12) {
		spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Noise(fmt.Sprint("some/", i), 100*seed+i, 200_000, 20), Compression: harness.GzipFast})
	}
	if seed%10 == 0 {
		spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Noise("many", 100*seed+99, manyFiles*64, manyFiles), Compression: harness.GzipFast})
	}
	return spec
}

func (b *bench) collectOn(ctx context.Context, k kind, host string, refs []string) (err error) {
	n, err := b.node(ctx, k.node, host)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	collecting, stop := context.WithCancel(ctx)
	defer stop()
	var took []time.Duration
	var collector errgroup.Group
	collector.Go(func() error {
		for collecting.Err() == nil {
			began := time.Now()
			if err := n.CollectGarbage(context.WithoutCancel(ctx)); err != nil {
				return err
			}
			took = append(took, time.Since(began))
		}
		return nil
	})
	for range b.rounds {
		g, ctx := errgroup.WithContext(ctx)
		for _, ref := range refs {
			g.Go(func() error {
				if _, err := n.Pull(ctx, "default", ref); err != nil {
					return err
				}
				_, err := n.Ctr(ctx, "default", "image", "rm", "--sync", ref)
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	stop()
	if err := collector.Wait(); err != nil {
		return err
	}
	slices.Sort(took)
	fmt.Printf("%s: %d times %d pulls at once: %d collections, median %s, slowest %s\n",
		k.name, b.rounds, len(refs), len(took), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	if k.name != gantry.name {
		return nil
	}
	return printCalls(ctx, n)
}

// waitedFor are the calls that containerd makes, or may be making, while its garbage collection waits: within a
// transaction of its database, under a lock of its stores, or from the collection itself.
var waitedFor = []string{
	"Content/Abort", "Content/Delete", "Content/Info", "Content/List", "Content/ListStatuses", "Content/Write OPEN", "Content/Write COMMIT",
	"Snapshots/Commit", "Snapshots/List", "Snapshots/Prepare", "Snapshots/Remove", "Snapshots/Update", "Snapshots/View",
}

// short are those of them that have a bound of their own.
var short = []string{"Snapshots/Prepare", "Snapshots/Commit", "Content/Write COMMIT"}

const (
	waitBound  = 100 // ms, of waitedFor without what was synced
	shortBound = 50  // ms, of short without that and without layers being mounted
)

// printCalls prints the longest calls of each method, in milliseconds, and whether they keep to the bounds.
func printCalls(ctx context.Context, n *harness.Node) error {
	text, err := n.GantryCLI(ctx, "status", "--json")
	if err != nil {
		return err
	}
	var report struct {
		Calls []struct {
			Method        string  `json:"method"`
			Count         int     `json:"count"`
			Longest       float64 `json:"longest"`
			LongestSync   float64 `json:"longest_sync"`
			LongestMounts float64 `json:"longest_mounts"`
			Work          float64 `json:"work"`
		} `json:"calls"`
	}
	if err := json.Unmarshal([]byte(text), &report); err != nil {
		return err
	}
	fmt.Printf("%-24s %8s %12s %12s %12s %14s\n", "call", "count", "longest, ms", "of it sync", "of it mounts", "beside both, ms")
	var wait, work float64
	for _, c := range report.Calls {
		if slices.Contains(waitedFor, c.Method) {
			wait = max(wait, 1e3*c.Work, 1e3*(c.Longest-c.LongestSync))
		}
		if slices.Contains(short, c.Method) {
			work = max(work, 1e3*c.Work)
		}
		fmt.Printf("%-24s %8d %12.1f %12.1f %12.1f %14.1f\n", c.Method, c.Count, 1e3*c.Longest, 1e3*c.LongestSync, 1e3*c.LongestMounts, 1e3*c.Work)
	}
	fmt.Printf("beside sync, the longest call that garbage collection may wait for took %.1f ms (bound %d: %s)\n", wait, waitBound, held(wait <= waitBound))
	fmt.Printf("beside sync and mounts, the longest Prepare, Commit or COMMIT took %.1f ms (bound %d: %s)\n", work, shortBound, held(work <= shortBound))
	return nil
}
