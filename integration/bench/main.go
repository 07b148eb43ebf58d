// Bench measures how long a pull takes through gantry and through containerd's
// overlayfs as shipped: same machine, same registry, same image, in turns, each
// pull on a node that has nothing yet. It prints medians and their ratio.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

func main() {
	rounds := flag.Int("rounds", 5, "pulls of each kind")
	bandwidth := flag.Int64("mib", 0, "limit each connection to this many MiB/s; 0: what loopback gives")
	latency := flag.Duration("latency", 0, "added to each request")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{rounds: *rounds, fault: harness.Fault{BytesPerSecond: *bandwidth << 20, Latency: *latency}}
	if err := b.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
}

type bench struct {
	rounds int
	fault  harness.Fault
	ref    string
	host   string
	nodes  []*harness.Node // stopped, to be closed
}

func (b *bench) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	folder, err := harness.NewPrivateFolder()
	if err != nil {
		return err
	}
	defer func() {
		for _, n := range b.nodes {
			err = errors.Join(err, n.Close())
		}
		err = errors.Join(err, folder.Close())
	}()
	dir := folder.Path
	registry, err := harness.StartRegistry(ctx, filepath.Join(dir, "registry"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	b.host = registry.Host()
	if b.fault.BytesPerSecond > 0 || b.fault.Latency > 0 {
		proxy, err := harness.StartProxy(ctx, registry.Host())
		if err != nil {
			return err
		}
		defer proxy.Close()
		proxy.SetRule(func(*http.Request) *harness.Fault { return &b.fault })
		b.host = proxy.Host()
	}
	if err := freshDisk(ctx, dir); err != nil {
		return err
	}
	im, err := b.push(ctx, dir, registry.Host())
	if err != nil {
		return err
	}
	fmt.Printf("image of GOROOT: %d layers, %.1f MiB compressed\n", len(im.Layers), float64(im.Size())/(1<<20))
	return b.measure(ctx)
}

func (b *bench) push(ctx context.Context, dir, registry string) (*harness.Image, error) {
	spec, err := harness.GorootSpec(ctx, dir)
	if err != nil {
		return nil, err
	}
	im, err := harness.Build(ctx, filepath.Join(dir, "image"), spec)
	if err != nil {
		return nil, err
	}
	b.ref = b.host + "/goroot:bench"
	_, err = im.Push(ctx, registry, "goroot", "bench")
	return im, err
}

func (b *bench) measure(ctx context.Context) error {
	kinds := []string{harness.Gantry, harness.Overlayfs}
	times := map[string][]time.Duration{}
	for round := range b.rounds {
		for _, kind := range kinds {
			d, err := b.pull(ctx, kind)
			if err != nil {
				return fmt.Errorf("%s: %w", kind, err)
			}
			times[kind] = append(times[kind], d)
			fmt.Printf("round %d  %-10s %6.2fs\n", round+1, kind, d.Seconds())
		}
		slices.Reverse(kinds) // who goes first alternates
	}
	ours, theirs := median(times[harness.Gantry]), median(times[harness.Overlayfs])
	fmt.Printf("\nmedian of %d  gantry %.2fs  overlayfs %.2fs  ratio %.2f\n", b.rounds, ours.Seconds(), theirs.Seconds(), theirs.Seconds()/ours.Seconds())
	return nil
}

// freshDisk makes the folder for temporary files, where nodes live, an ext4 file
// system of its own, made anew: what was created and deleted on the machine's
// before decides how long it takes to create files there. (Without a journal,
// inodes of deleted files are not used again for minutes, and the search for
// others cost overlayfs up to 10 s here.)
func freshDisk(ctx context.Context, dir string) error {
	file, mounted := filepath.Join(dir, "disk"), filepath.Join(dir, "fs")
	if err := os.Mkdir(mounted, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"truncate", "-s", "16G", file},
		{"mkfs.ext4", "-q", "-N", "1000000", "-E", "lazy_itable_init=0,lazy_journal_init=0", file},
		{"mount", "-o", "loop", file, mounted},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", args[0], err, out)
		}
	}
	return os.Setenv("TMPDIR", mounted)
}

// pull starts a node with nothing on it, pulls, and stops the node. Its folder
// stays to the end, so that no round pays for the deletions of the one before.
func (b *bench) pull(ctx context.Context, kind string) (_ time.Duration, err error) {
	// containerd as shipped has neither program; what this machine has in PATH must not decide.
	n, err := harness.StartNode(ctx, harness.Options{Snapshotter: kind, Env: []string{"CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1"}})
	if err != nil {
		return 0, err
	}
	b.nodes = append(b.nodes, n)
	defer func() { err = errors.Join(err, n.Stop()) }()
	if err := n.AddRegistry("http", b.host); err != nil {
		return 0, err
	}
	unix.Sync() // what the last round wrote is not this one's work
	begin := time.Now()
	if _, err := n.Pull(ctx, "default", b.ref); err != nil {
		return 0, err
	}
	took := time.Since(begin)
	return took, n.Complete(ctx, "default", b.ref)
}

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}
