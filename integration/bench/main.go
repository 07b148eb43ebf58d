// Bench measures pulls through gantry, in turns with pulls through containerd's
// overlayfs as shipped: same machine, same registry, same image, each on a node
// that has nothing yet. It prints medians and ratios.
//
//	pull    an image of Go's own distribution, from a distribution registry on loopback
//	wide    an image of 0.9 GB from a registry that gives each connection 25 MB/s, all together 250 MB/s, after 20 ms
//	memory  10 GB in all at full speed, and how much memory gantryd took at most
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/integration/harness"
)

var scenarios = map[string]func(*bench, context.Context) error{
	"pull":   (*bench).pull,
	"wide":   (*bench).wide,
	"memory": (*bench).memory,
}

func main() {
	rounds := flag.Int("rounds", 5, "pulls of each kind")
	only := flag.String("only", "pull,wide,memory", "what to measure, separated by commas")
	total := flag.Int64("gb", 10, "how many GB the memory scenario pulls in all")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *rounds, *total, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
}

func run(ctx context.Context, rounds int, gb int64, names []string) error {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	for _, name := range names {
		if scenarios[name] == nil {
			return fmt.Errorf("no scenario %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(scenarios)), ", "))
		}
	}
	for _, name := range names {
		if err := scenario(ctx, rounds, gb, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// scenario runs one in a folder of its own, which it removes.
func scenario(ctx context.Context, rounds int, gb int64, name string) (err error) {
	folder, err := harness.NewPrivateFolder()
	if err != nil {
		return err
	}
	b := &bench{rounds: rounds, total: gb * 1e9, dir: folder.Path}
	temporary := os.Getenv("TMPDIR")
	defer func() {
		err = errors.Join(err, os.Setenv("TMPDIR", temporary)) // freshDisk's goes with the folder
		for _, n := range b.nodes {
			err = errors.Join(err, n.Close())
		}
		err = errors.Join(err, folder.Close())
	}()
	fmt.Printf("=== %s\n", name)
	return scenarios[name](b, ctx)
}

// bench is one scenario's measurement.
type bench struct {
	rounds int
	total  int64 // bytes, of the memory scenario
	dir    string
	nodes  []*harness.Node // to be closed
}

// compare pulls ref in turns through gantry and through overlayfs and returns the medians by kind.
func (b *bench) compare(ctx context.Context, host, ref string) (map[string]time.Duration, error) {
	kinds := []string{harness.Gantry, harness.Overlayfs}
	times := map[string][]time.Duration{}
	for round := range b.rounds {
		for _, kind := range kinds {
			d, err := b.once(ctx, kind, host, ref)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", kind, err)
			}
			times[kind] = append(times[kind], d)
			fmt.Printf("round %d  %-10s %6.2fs\n", round+1, kind, d.Seconds())
		}
		slices.Reverse(kinds) // who goes first alternates
	}
	medians := map[string]time.Duration{}
	for kind, all := range times {
		medians[kind] = median(all)
	}
	ours, theirs := medians[harness.Gantry], medians[harness.Overlayfs]
	fmt.Printf("median of %d  gantry %.2fs  overlayfs %.2fs  ratio %.2f\n", b.rounds, ours.Seconds(), theirs.Seconds(), theirs.Seconds()/ours.Seconds())
	return medians, nil
}

// once starts a node with nothing on it, pulls, and stops the node. Its folder
// stays to the end, so that no round pays for the deletions of the one before.
func (b *bench) once(ctx context.Context, kind, host, ref string) (_ time.Duration, err error) {
	n, err := b.node(ctx, kind, host)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, n.Stop()) }()
	if err := coldCache(); err != nil {
		return 0, err
	}
	begin := time.Now()
	if _, err := n.Pull(ctx, "default", ref); err != nil {
		return 0, err
	}
	took := time.Since(begin)
	return took, n.Complete(ctx, "default", ref)
}

func (b *bench) node(ctx context.Context, kind, host string) (*harness.Node, error) {
	// containerd as shipped has neither program; what this machine has in PATH must not decide.
	n, err := harness.StartNode(ctx, harness.Options{Snapshotter: kind, Env: []string{"CONTAINERD_DISABLE_IGZIP=1", "CONTAINERD_DISABLE_PIGZ=1"}})
	if err != nil {
		return nil, err
	}
	b.nodes = append(b.nodes, n)
	return n, n.AddRegistry("http", host)
}

// freshDisk makes the folder for temporary files, where nodes live, an ext4 file
// system of its own, made anew: what was created and deleted on the machine's
// before decides how long it takes to create files there. (Without a journal,
// inodes of deleted files are not used again for minutes, and the search for
// others cost overlayfs up to 10 s here.)
func (b *bench) freshDisk(ctx context.Context, gib int) error {
	file, mounted := filepath.Join(b.dir, "disk"), filepath.Join(b.dir, "fs")
	if err := os.Mkdir(mounted, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dG", gib), file},
		{"mkfs.ext4", "-q", "-N", "1000000", "-E", "lazy_itable_init=0,lazy_journal_init=0", file},
		{"mount", "-o", "loop", file, mounted},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", args[0], err, out)
		}
	}
	return os.Setenv("TMPDIR", mounted)
}

// coldCache writes back what earlier rounds wrote and empties the page cache: neither
// is this round's work, and a virtual machine pays dearly for each page of memory
// that it touches for the first time.
func coldCache() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}
