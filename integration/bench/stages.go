package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// stages tells what each stage of a pull costs gantryd, in ns of CPU time for a byte, on the images of large and
// small, and what that predicts for machines with more cores. The costs are sampled from outside while gantryd pulls.
func (b *bench) stages(ctx context.Context) error {
	if why := noPerf(ctx); why != "" {
		fmt.Println("NOT MEASURED:", why)
		return nil
	}
	restore, err := b.symbols(ctx)
	if err != nil {
		return err
	}
	defer restore()
	disk, err := b.diskSpeed(ctx)
	if err != nil {
		return err
	}
	var all []*profile
	for _, im := range []struct {
		name string
		spec harness.ImageSpec
	}{{largeName, largeSpec()}, {smallName, smallSpec()}} {
		p, err := b.profiled(ctx, im.name, im.spec)
		if err != nil {
			return fmt.Errorf("%s: %w", im.name, err)
		}
		all = append(all, p)
	}
	printCosts(all)
	printPrediction(all, disk)
	return nil
}

// symbols builds gantryd with its functions' names in it, which `make build` leaves out, for the nodes to
// come. The caller calls what it returns to have the usual one again.
func (b *bench) symbols(ctx context.Context) (func(), error) {
	dir := filepath.Join(b.dir, "bin")
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+"/", "./cmd/...")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build gantryd with symbols: %w: %s", err, out)
	}
	before, set := os.LookupEnv("GANTRY_BIN")
	return func() {
		if set {
			_ = os.Setenv("GANTRY_BIN", before)
		} else {
			_ = os.Unsetenv("GANTRY_BIN")
		}
	}, os.Setenv("GANTRY_BIN", dir)
}

// profile is what an image's pulls cost.
type profile struct {
	name  string
	pulls int
	// Bytes of each layer, packed and unpacked.
	layers []layerBytes
	wall   []time.Duration
	// CPU seconds of all pulls: gantryd's by stage, and what else the pull made the machine do.
	cpu              map[*stage]float64
	other, registry  float64
	compressed, tars int64
}

type layerBytes struct{ blob, tar int64 }

func (b *bench) profiled(ctx context.Context, name string, spec harness.ImageSpec) (_ *profile, err error) {
	im, err := harness.BuildCached(ctx, name, spec)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(b.dir, "registry-"+name)
	registry, err := harness.StartRegistry(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	ref, err := im.Push(ctx, registry.Host(), name, "bench")
	if err != nil {
		return nil, err
	}
	p := &profile{name: name, cpu: map[*stage]float64{}, compressed: im.Size()}
	c := contest{host: registry.Host(), ref: ref, registry: []int{registry.PID()}, gib: 8, warm: filepath.Join(dir, "data")}
	for round := range b.rounds {
		took, err := b.profileOnce(ctx, p, c)
		if err != nil {
			return nil, err
		}
		fmt.Printf("round %d  %-9s %s\n", round+1, name, took)
	}
	return p, nil
}

// profileOnce pulls and adds what it cost to p.
func (b *bench) profileOnce(ctx context.Context, p *profile, c contest) (took cost, err error) {
	if err := b.freshDisk(ctx, c.gib); err != nil {
		return took, err
	}
	defer func() { err = errors.Join(err, b.disk.Close()) }()
	n, err := b.node(ctx, gantry.node, c.host)
	if err != nil {
		return took, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := coldCache(c.warm); err != nil {
		return took, err
	}
	perf, err := startProfiler(ctx, b.dir, n.Gantryd().PID())
	if err != nil {
		return took, err
	}
	clock, err := startClock([]int{n.Gantryd().PID()}, c.registry)
	if err != nil {
		return took, err
	}
	_, pulled := n.Pull(ctx, "default", c.ref)
	took, err = clock.stop()
	counts, stopped := perf.stop(ctx)
	if err := errors.Join(pulled, err, stopped); err != nil {
		return took, err
	}
	p.add(took, counts)
	p.layers, err = layersOf(ctx, n)
	p.tars = 0
	for _, l := range p.layers {
		p.tars += l.tar
	}
	return took, err
}

// add shares gantryd's CPU time out by the samples.
func (p *profile) add(took cost, counts map[*stage]int) {
	samples := 0
	for _, n := range counts {
		samples += n
	}
	for s, n := range counts {
		p.cpu[s] += took.cpu.Seconds() * float64(n) / float64(samples)
	}
	p.pulls++
	p.wall = append(p.wall, took.wall)
	p.registry += took.registry.Seconds()
	p.other += (took.machine - took.cpu - took.registry).Seconds()
}

// perByte is a stage's CPU time in ns for a byte of what it handles.
func (p *profile) perByte(s *stage) float64 {
	bytes := p.compressed
	if s.tar {
		bytes = p.tars
	}
	return p.cpu[s] * 1e9 / float64(bytes) / float64(p.pulls)
}

// layersOf asks gantryd for the sizes of the layers that it has unpacked.
func layersOf(ctx context.Context, n *harness.Node) ([]layerBytes, error) {
	out, err := n.GantryCLI(ctx, "status", "--json")
	if err != nil {
		return nil, err
	}
	var status struct {
		Recent []struct {
			Size    int64 `json:"size"`
			Written int64 `json:"written"`
		} `json:"recent"`
	}
	if err := json.Unmarshal([]byte(out), &status); err != nil {
		return nil, fmt.Errorf("gantry status --json: %w", err)
	}
	var all []layerBytes
	for _, l := range status.Recent {
		all = append(all, layerBytes{l.Size, l.Written})
	}
	return all, nil
}

// printCosts prints the table of stages as Markdown.
func printCosts(all []*profile) {
	fmt.Printf("\n| stage, ns of CPU time for a byte | of the | one layer's bytes |")
	for _, p := range all {
		fmt.Printf(" %s |", p.name)
	}
	fmt.Printf("\n|---|---|---|")
	for range all {
		fmt.Print("---|")
	}
	fmt.Println()
	for _, s := range stages {
		of, how := "blob", "on several cores"
		if s.tar {
			of = "tar"
		}
		if s.serial {
			how = "one after another"
		}
		fmt.Printf("| %s | %s | %s |", s.name, of, how)
		for _, p := range all {
			fmt.Printf(" %.2f |", p.perByte(s))
		}
		fmt.Println()
	}
	for _, p := range all {
		fmt.Printf("%s: %d layers, %.2f GB of blobs, %.2f GB of tars; gantryd %.2f s of CPU time a pull, the registry %.2f s, everything else %.2f s\n",
			p.name, len(p.layers), float64(p.compressed)/1e9, float64(p.tars)/1e9, p.total(), p.registry/float64(p.pulls), p.other/float64(p.pulls))
	}
}

// total is gantryd's CPU time for one pull, in seconds.
func (p *profile) total() float64 {
	sum := 0.0
	for _, s := range p.cpu {
		sum += s
	}
	return sum / float64(p.pulls)
}

// printPrediction prints what the costs predict, as Markdown: whatever takes longest bounds the pull.
func printPrediction(all []*profile, disk float64) {
	fmt.Printf("\nA prediction, not measured: whatever takes longest of all CPU time over the cores, one layer's way through a stage that is\n"+
		"not shared, and the bytes over the disk's rate (%.0f MB/s, one writer, direct I/O). No network is in the way.\n", disk/1e6)
	fmt.Printf("\n| cores |")
	for _, p := range all {
		fmt.Printf(" %s | bound by |", p.name)
	}
	fmt.Printf("\n|---|")
	for range all {
		fmt.Print("---|---|")
	}
	fmt.Println()
	for _, cores := range []int{2, 8, 32} {
		fmt.Printf("| %d |", cores)
		for _, p := range all {
			seconds, why := p.predict(cores, disk)
			fmt.Printf(" %.1f s | %s |", seconds, why)
		}
		fmt.Println()
	}
	for _, p := range all {
		fmt.Printf("%s took %.2f s here (median of %d, %d cores, with the registry and all else on them, and being sampled)\n",
			p.name, median(p.wall).Seconds(), p.pulls, runtime.NumCPU())
	}
}

// predict is the largest of: all CPU time over the cores (here the registry and the kernel's own work have to be done by
// them too), the largest layer's bytes through each stage that cannot be shared, and the bytes through the disk.
func (p *profile) predict(cores int, disk float64) (float64, string) {
	n := float64(p.pulls)
	seconds, why := (p.total()+(p.registry+p.other)/n)/float64(cores), "all CPU time"
	for _, s := range stages {
		if !s.serial {
			continue
		}
		largest := slices.MaxFunc(p.layers, func(a, b layerBytes) int { return int(s.of(a) - s.of(b)) })
		if t := float64(s.of(largest)) * p.perByte(s) / 1e9; t > seconds {
			seconds, why = t, s.name+", one layer"
		}
	}
	if t := float64(p.compressed+p.tars) / disk; t > seconds {
		seconds, why = t, "disk"
	}
	return seconds, why
}

// of is how many of the layer's bytes the stage handles.
func (s *stage) of(l layerBytes) int64 {
	if s.tar {
		return l.tar
	}
	return l.blob
}
