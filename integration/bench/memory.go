package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

// Layers of the memory scenario's images, bytes uncompressed. Two images are pulled at a time.
const (
	randomLayer = 900_000_000
	textLayer   = 300_000_000
)

// memory pulls many gigabytes at full speed and tells the most memory that gantryd ever had (VmHWM of proc(5)).
func (b *bench) memory(ctx context.Context) (err error) {
	registry, err := harness.StartFaultRegistry(ctx, harness.FaultOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	images, compressed := 0, int64(0)
	for ; compressed < b.total; images++ {
		im, err := harness.Build(ctx, filepath.Join(b.dir, fmt.Sprint("image", images)), memorySpec(uint64(images)))
		if err != nil {
			return err
		}
		registry.AddImage(im, fmt.Sprint("large", images), "bench")
		compressed += im.Size()
	}
	n, err := b.node(ctx, gantry.node, registry.Host())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	begin := time.Now()
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(2)
	for i := range images {
		g.Go(func() error {
			_, err := n.Pull(gctx, "default", fmt.Sprintf("%s/large%d:bench", registry.Host(), i))
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	took := time.Since(begin)
	peak, err := peakMemory(n.Gantryd().PID())
	if err != nil {
		return err
	}
	unpacked := float64(images) * 2 * (randomLayer + textLayer)
	fmt.Printf("%d images, %.1f GB compressed, %.1f GB unpacked, two at a time, in %.1fs (%.0f MB/s): gantryd's peak memory %.0f MiB\n",
		images, float64(compressed)/1e9, unpacked/1e9, took.Seconds(), float64(compressed)/1e6/took.Seconds(), float64(peak)/(1<<20))
	return nil
}

// memorySpec is an image of four layers: what nothing compresses, and text.
func memorySpec(seed uint64) harness.ImageSpec {
	var spec harness.ImageSpec
	for i := range uint64(2) {
		spec.Layers = append(spec.Layers,
			harness.LayerSpec{Tar: harness.Random("random", 4*seed+2*i, randomLayer, 3), Compression: harness.GzipFast},
			harness.LayerSpec{Tar: harness.Text("text", 4*seed+2*i+1, textLayer, 300), Compression: harness.GzipFast})
	}
	return spec
}

// peakMemory is the most resident memory a process ever had, in bytes.
func peakMemory(pid int) (int64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmHWM:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			return kib << 10, err
		}
	}
	return 0, errors.Join(fmt.Errorf("no VmHWM of process %d", pid), lines.Err())
}
