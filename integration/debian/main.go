// Debian makes the layers of the Debian images that tests pull, both releases at once: most of the time goes into
// waiting for the network. What is in the cache already is not made again.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "debian:", err)
		stop()
		os.Exit(1) //nolint:gocritic // nothing is deferred but stop
	}
}

func run(ctx context.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("debootstrap needs root")
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, suite := range harness.DebianSuites {
		g.Go(func() error {
			_, err := harness.DebianTars(ctx, suite)
			return err
		})
	}
	return g.Wait()
}
