package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

// contest is one image, pulled in turns by several kinds.
type contest struct {
	host, ref string
	registry  []int // process ids
	kinds     []kind
	gib       int    // of the disk each pull gets
	warm      string // folder that the registry serves from; "": it reads its disk
}

// compare pulls in turns and returns the medians by kind.
func (b *bench) compare(ctx context.Context, c contest) (medians, error) {
	kinds := b.present(ctx, c.kinds)
	times := map[string][]time.Duration{}
	for round := range b.rounds {
		for _, k := range kinds {
			took, err := b.once(ctx, k, c)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", k.name, err)
			}
			times[k.name] = append(times[k.name], took.wall)
			fmt.Printf("round %d  %-10s %s\n", round+1, k.name, took)
		}
		kinds = slices.Concat(kinds[1:], kinds[:1]) // who goes first changes
	}
	m := medians{}
	for _, k := range c.kinds {
		if all := times[k.name]; all != nil {
			m[k.name] = median(all)
			fmt.Printf("median of %d  %-10s %6.2fs  (%.2f to %.2f)", b.rounds, k.name, m[k.name].Seconds(), slices.Min(all).Seconds(), slices.Max(all).Seconds())
			if k.name != gantry.name && m[gantry.name] > 0 {
				fmt.Printf("  ratio %.2f", m[k.name].Seconds()/m[gantry.name].Seconds())
			}
			fmt.Println()
		}
	}
	return m, nil
}

// medians by the kind's name.
type medians map[string]time.Duration

// faster prints whether gantry is so many times faster than another kind.
func (m medians) faster(other kind, times float64) {
	theirs := m[other.name]
	if theirs == 0 || m[gantry.name] == 0 {
		fmt.Printf("bound: at least %g times faster than %s: NOT MEASURED\n", times, other.name)
		return
	}
	ratio := theirs.Seconds() / m[gantry.name].Seconds()
	fmt.Printf("bound: at least %g times faster than %s: %.2f, %s\n", times, other.name, ratio, held(ratio >= times))
}

// within prints whether gantry takes at most so many times as long as another kind.
func (m medians) within(other kind, times float64) {
	theirs := m[other.name]
	if theirs == 0 || m[gantry.name] == 0 {
		fmt.Printf("bound: at most %g times as long as %s: NOT MEASURED\n", times, other.name)
		return
	}
	ratio := m[gantry.name].Seconds() / theirs.Seconds()
	fmt.Printf("bound: at most %g times as long as %s: %.2f, %s\n", times, other.name, ratio, held(ratio <= times))
}

func held(ok bool) string {
	if ok {
		return "held"
	}
	return "NOT held"
}

// once gives one kind a disk and a node with nothing on them, and pulls. Both are
// gone afterwards; what that costs is over before the next begins.
func (b *bench) once(ctx context.Context, k kind, c contest) (took cost, err error) {
	if err := b.freshDisk(ctx, c.gib); err != nil {
		return took, err
	}
	defer func() { err = errors.Join(err, b.disk.Close()) }()
	if k.command != nil {
		return b.run(ctx, k.command(b, c.ref), c)
	}
	n, err := b.node(ctx, k.node, c.host)
	if err != nil {
		return took, err
	}
	defer func() { err = errors.Join(err, n.Close()) }()
	if err := coldCache(c.warm); err != nil {
		return took, err
	}
	clock, err := startClock(pids(n), c.registry)
	if err != nil {
		return took, err
	}
	if _, err := n.Pull(ctx, "default", c.ref); err != nil {
		return took, err
	}
	if took, err = clock.stop(); err != nil {
		return took, err
	}
	return took, n.Complete(ctx, "default", c.ref)
}

// run measures a command that gets the image.
func (b *bench) run(ctx context.Context, args []string, c contest) (cost, error) {
	if err := coldCache(c.warm); err != nil {
		return cost{}, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, fmt.Errorf("%s hangs", args[0]))
	defer cancel()
	clock, err := startClock(nil, c.registry)
	if err != nil {
		return cost{}, err
	}
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return cost{}, errors.Join(fmt.Errorf("%s: %w: %s", args[0], err, out), context.Cause(ctx))
	}
	took, err := clock.stop()
	took.cpu = cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()
	return took, err
}

// pids are the processes whose CPU time is a pull's.
func pids(n *harness.Node) []int {
	all := []int{n.Containerd().PID()}
	if g := n.Gantryd(); g != nil {
		all = append(all, g.PID())
	}
	return all
}

// node starts a node that knows the registry. The caller closes it.
func (b *bench) node(ctx context.Context, o harness.Options, host string) (*harness.Node, error) {
	o.Env = append(o.Env, "CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1")
	n, err := harness.StartNode(ctx, o)
	if err != nil {
		return nil, err
	}
	if err := n.AddRegistry("http", host); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

// freshDisk makes the folder for temporary files, where nodes live, a disk of its own.
func (b *bench) freshDisk(ctx context.Context, gib int) (err error) {
	dir := filepath.Join(b.dir, "disk")
	if b.ownDisk {
		b.disk, err = harness.NewFolder(dir)
	} else {
		b.disk, err = harness.NewDisk(ctx, dir, gib)
	}
	if err != nil {
		return err
	}
	return os.Setenv("TMPDIR", b.disk.Path)
}

// coldCache writes back what earlier rounds wrote and empties the page cache: neither
// is this round's work, and a virtual machine pays dearly for each page of memory
// that it touches for the first time. What lies in the folder warm is read again: a registry
// that has to read this machine's disk would not be as fast as the network can be.
func coldCache(warm string) error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil || warm == "" {
		return err
	}
	return harness.ReadAll(warm)
}

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}
