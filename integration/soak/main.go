// Soak pulls, runs and removes images for minutes, from many clients at once, while gantryd is killed and started
// again and containerd collects garbage. It fails if a byte was wrong, a client was stuck, something failed that no kill
// explains, gantryd grew, or anything is left in the end: mounts, loop devices, files, database entries. The same
// seed gives the same images and the same choices; what meets what is up to the machine.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

func main() {
	var s soak
	minutes := flag.Float64("minutes", 10, "how long cycles are begun")
	flag.IntVar(&s.least, "cycles", 500, "how many cycles at least, even if that takes longer")
	flag.IntVar(&s.clients, "clients", 20, "clients at once")
	flag.Uint64Var(&s.seed, "seed", 1, "of images and choices")
	flag.StringVar(&s.retain, "retain", "all", "gantryd's content.retain")
	flag.StringVar(&s.upper, "upper", "directory", "gantryd's snapshotter.upper")
	flag.Parse()
	s.length = time.Duration(*minutes * float64(time.Minute))
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := s.run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "soak: FAILED:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
	fmt.Println("soak: ok")
}

// soak is one run.
type soak struct {
	length  time.Duration
	least   int
	clients int
	seed    uint64
	retain  string
	upper   string

	dir   string
	node  *harness.Node
	kinds []*kind
	kills *killer
	tally tally
}

// Shares of the time: first gantryd is killed all the while; then it runs on, twice, to see whether it grows.
const (
	killedShare = 0.7
	quietShare  = 0.15
)

// keepPartial is gantryd's least transfer.keep_partial: what killed pulls left is swept after it.
const keepPartial = time.Minute

func (s *soak) run(ctx context.Context) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("mounting needs root")
	}
	folder, err := harness.NewPrivateFolder()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, folder.Close()) }()
	s.dir = folder.Path
	registry, err := harness.StartFaultRegistry(ctx, harness.FaultOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, registry.Close()) }()
	if s.kinds, err = buildKinds(ctx, s.dir, s.seed, s.clients, registry); err != nil {
		return fmt.Errorf("images: %w", err)
	}
	s.node, err = harness.StartNode(ctx, harness.Options{GCDelay: 100 * time.Millisecond, GantryExtra: fmt.Sprintf(
		"\n[transfer]\nkeep_partial = '%s'\n[content]\nretain = %q\n[snapshotter]\nupper = %q\n", keepPartial, s.retain, s.upper)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.node.Close()) }()
	if err := s.node.AddRegistry("http", registry.Host()); err != nil {
		return err
	}
	fmt.Printf("%d clients, %s, seed %d, %d kinds of images\n", s.clients, s.length, s.seed, len(s.kinds))
	err = s.soak(ctx)
	s.tally.print()
	if err != nil {
		return fmt.Errorf("%w\n%s\n%s", err, s.node.Gantryd().Tail(), s.node.Containerd().Tail())
	}
	return nil
}

// soak runs all phases and looks at what they leave.
func (s *soak) soak(ctx context.Context) error {
	s.kills = newKiller(s.node, s.seed)
	share := func(f float64) time.Duration { return time.Duration(f * float64(s.length)) }
	ended := make(chan error, 1)
	killing, stop := context.WithCancel(ctx)
	go func() { ended <- s.kills.run(killing) }()
	err := s.phase(ctx, share(killedShare), int(killedShare*float64(s.least)))
	stop()
	if err := errors.Join(err, <-ended); err != nil {
		return err
	}
	var before, after growth
	for i, g := range []*growth{&before, &after} {
		if err := s.phase(ctx, share(quietShare), int(quietShare*float64(s.least))); err != nil {
			return fmt.Errorf("without kills: %w", err)
		}
		if *g, err = s.idle(ctx, before); err != nil {
			return err
		}
		files, err := openFiles(s.node.Gantryd().PID())
		if err != nil {
			return err
		}
		fmt.Printf("gantryd idle after quiet phase %d: %s (%s)\n", i+1, *g, files)
	}
	return errors.Join(after.exceeds(before), s.left(ctx))
}

// phase has all clients begin cycles for so long and until there were enough, and collects garbage all the while.
func (s *soak) phase(ctx context.Context, length time.Duration, least int) error {
	until, enough := time.Now().Add(length), s.tally.cycles()+least
	g, ctx := errgroup.WithContext(ctx)
	for i := range s.clients {
		c := newClient(s, i)
		g.Go(func() error {
			for ctx.Err() == nil && (time.Now().Before(until) || s.tally.cycles() < enough) {
				if err := c.cycle(ctx); err != nil {
					return fmt.Errorf("client %d: %w", i, err)
				}
			}
			return context.Cause(ctx)
		})
	}
	collecting, stop := context.WithCancel(ctx)
	ended := make(chan error, 1)
	go func() { ended <- s.collect(collecting) }()
	err := g.Wait()
	stop()
	return errors.Join(err, <-ended)
}

// collect has containerd collect garbage again and again.
func (s *soak) collect(ctx context.Context) error {
	c := newClient(s, s.clients)
	for ctx.Err() == nil {
		err := c.try(context.WithoutCancel(ctx), "collect garbage", s.node.CollectGarbage)
		if err != nil {
			return err
		}
		pause(ctx, time.Duration(c.rnd.IntN(1000))*time.Millisecond)
	}
	return nil
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
