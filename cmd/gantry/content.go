package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/restore"
)

var restoreCommand = command{
	name: "content restore",
	help: `Usage: gantry [--config FILE] content restore [--json]

Fetches again the compressed bytes of all layers that gantryd has discarded (content.retain = "none"), and keeps
them. gantryd must be running. Do this before containerd goes back to its own content store, which cannot read
discarded layers: a push or an export, or unpacking for another snapshotter, would fail there. First set
content.retain = "all" in gantryd's configuration and restart gantryd, so that nothing more is discarded.

One line a layer. A layer that cannot be fetched is named, with the reason, and the others go on; the exit code is 1
then. After that, after Ctrl-C or a crash, the same command goes on with what is missing. "gantry status" shows the
transfers meanwhile.

  --json     print each event as a line of JSON; sizes are in bytes
`,
	define: func(flags *flag.FlagSet) { flags.Bool("json", false, "") },
	run:    runRestore,
}

func runRestore(ctx context.Context, c *config.Config, flags *flag.FlagSet, stdout io.Writer) (err error) {
	if err := reachable(ctx, c.Address); err != nil {
		return err
	}
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	tell := func(e restore.Event) error { return print(stdout, restoreLine(e)) }
	if flags.Lookup("json").Value.String() == "true" {
		tell = asJSON(stdout)
	}
	failed, last := 0, restore.Event{}
	// It tells at once how much there is.
	within, heard := untilSilent(ctx)
	defer heard()
	err = restore.Call(within, conn, func(e restore.Event) error {
		heard()
		last = e
		if e.State == restore.Failed {
			failed++
		}
		return tell(e)
	})
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted with %d of %d layers done; the same command goes on from there", last.Done, last.Blobs)
	case errors.Is(context.Cause(within), errNoAnswer):
		return fmt.Errorf("gantryd at %s: %w (systemctl status gantryd)", c.Address, errNoAnswer)
	case err != nil:
		return fmt.Errorf("gantryd at %s, with %d of %d layers done: %w; the same command goes on from there", c.Address, last.Done, last.Blobs, err)
	case failed > 0:
		return fmt.Errorf("%d of %d layers could not be fetched; make their registries available and repeat the command, or remove their images", failed, last.Blobs)
	}
	return nil
}

func asJSON(w io.Writer) func(restore.Event) error {
	enc := json.NewEncoder(w)
	return func(e restore.Event) error { return enc.Encode(e) }
}

// restoreLine is an event for people.
func restoreLine(e restore.Event) string {
	switch {
	case e.State == restore.Begun && e.Blobs == 0:
		return "no layer is discarded\n"
	case e.State == restore.Begun:
		return fmt.Sprintf("%d layers to fetch, %s\n", e.Blobs, amount(e.Bytes))
	}
	return fmt.Sprintf("%d of %d, %s: %s %s, %s in %s%s\n", e.Done, e.Blobs, percent(e.DoneBytes, e.Bytes),
		e.State, e.Digest, amount(e.Size), seconds(e.Seconds), reason(e.Error))
}
