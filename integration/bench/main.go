// Bench measures pulls through gantry, in turns with pulls through containerd's
// overlayfs as shipped: same machine, same registry, same image, each on a node
// that has nothing yet. It prints medians and ratios.
//
//	pull    an image of Go's own distribution, from a distribution registry on loopback
//	wide    an image of 0.9 GB from a registry that gives each connection 25 MB/s, all together 250 MB/s, after 20 ms
//	large   an image of 1 GB, most of it compressed before, from an uncapped distribution registry
//	stored  the same with bytes of which gzip makes stored blocks
//	small   an image of 86,000 small files, 0.7 GB, from the same
//	tail    how long after its last byte a layer of 1 GB is mountable
//	deflate inflating in gantry's own package beside klauspost/compress, on one and two cores
//	stages  what each stage of a pull costs for a byte, and what that predicts for more cores
//	memory  10 GB in all at full speed, and how much memory gantryd took at most
//	gc      the longest calls while twenty images are pulled and removed at once and containerd collects garbage
//	start   starting a container of an image that is there
//	read    reading an image's files
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/gantryd/gantry/integration/harness"
)

var scenarios = map[string]func(*bench, context.Context) error{
	"pull":    (*bench).pull,
	"wide":    (*bench).wide,
	"large":   (*bench).large,
	"stored":  (*bench).stored,
	"small":   (*bench).small,
	"tail":    (*bench).tail,
	"deflate": (*bench).deflate,
	"stages":  (*bench).stages,
	"memory":  (*bench).memory,
	"gc":      (*bench).collect,
	"start":   (*bench).start,
	"read":    (*bench).read,
}

func main() {
	rounds := flag.Int("rounds", 5, "pulls of each kind")
	only := flag.String("only", "pull,wide,large,stored,small,tail,deflate,stages,memory,gc,start,read", "what to measure, separated by commas")
	own := flag.Bool("own-disk", false, "pull to the machine's own disk, not to a new file system for each pull")
	kinds := flag.String("kinds", "", "who takes part in large, stored, small and gc, separated by commas; empty: everybody")
	total := flag.Int64("gb", 10, "how many GB the memory scenario pulls in all")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := bench{rounds: *rounds, total: *total * 1e9, ownDisk: *own}
	if *kinds != "" {
		b.kinds = strings.Split(*kinds, ",")
	}
	if err := run(ctx, b, strings.Split(*only, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
}

func run(ctx context.Context, b bench, names []string) error {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	for _, name := range names {
		if scenarios[name] == nil {
			return fmt.Errorf("no scenario %q: there are %s", name, strings.Join(slices.Sorted(maps.Keys(scenarios)), ", "))
		}
	}
	for _, name := range names {
		if err := scenario(ctx, b, name); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// scenario runs one in a folder of its own, which it removes.
func scenario(ctx context.Context, b bench, name string) (err error) {
	folder, err := harness.NewPrivateFolder()
	if err != nil {
		return err
	}
	b.dir = folder.Path
	temporary := os.Getenv("TMPDIR")
	defer func() {
		err = errors.Join(err, os.Setenv("TMPDIR", temporary), folder.Close()) // freshDisk's is gone
	}()
	fmt.Printf("=== %s\n", name)
	return scenarios[name](&b, ctx)
}

// bench is one scenario's measurement.
type bench struct {
	rounds  int
	ownDisk bool
	kinds   []string // that take part; empty: all
	total   int64    // bytes, of the memory scenario
	dir     string
	disk    *harness.Disk // of the pull under way
}
