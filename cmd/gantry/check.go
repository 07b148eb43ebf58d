package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/gantryd/gantry/plugin"
	"github.com/gantryd/gantry/plugin/check"
	"github.com/gantryd/gantry/plugin/config"
)

var checkCommand = command{
	name: "check",
	help: `Usage: gantry [--config FILE] check [--repair] [--workers N] [--json]

Verifies all that gantryd keeps: each blob against its digest, each layer file against its name, the records of discarded
blobs, what is left of transfers, the snapshots' folders, links, indexes and mounts, the database, and what containerd
believes to have, if it uses this gantryd. Each fault is told with what it means, which images it affects (if containerd answers) and its cure.
Without --repair nothing is changed, so a full disk and one that went read-only can be checked.

It may run at any time. A running gantryd does it, while pulls and containers go on; otherwise it is done here, and
gantryd cannot start meanwhile. Files are read past the page cache, on as many threads as there are CPUs. Ctrl-C ends it, and so
does a stop of gantryd.

  --repair     cure what can be cured: a broken blob is fetched again, or dropped so that the next pull fetches it; a
               broken layer file is made anew from its blob or its registry, and containers started from then on use it;
               indexes are written again; a broken metadata.db is replaced by the copy that gantryd keeps (stop gantryd for
               that). What containers have written is never removed. containerd should be running: it knows where
               blobs came from
  --workers N  read N files at once
  --json       print each event as a line of JSON; sizes are in bytes

Exit codes: 0 nothing is wrong, or all of it was repaired; 1 something is; 2 it could not be checked.
`,
	define: func(flags *flag.FlagSet) {
		flags.Bool("json", false, "")
		flags.Bool("repair", false, "")
		flags.Int("workers", 0, "")
	},
	run: runCheck,
}

// uncheckedError: the check could not be made.
type uncheckedError struct{ error }

func (e uncheckedError) Unwrap() error { return e.error }

func runCheck(ctx context.Context, c *config.Config, flags *flag.FlagSet, stdout io.Writer) error {
	flag := func(name string) any { return flags.Lookup(name).Value.(interface{ Get() any }).Get() }
	request := check.Request{Repair: flag("repair").(bool), Workers: flag("workers").(int)}
	if request.Workers < 0 {
		return usageError{fmt.Sprintf("--workers %d: it must not be negative; see gantry help check", request.Workers)}
	}
	v := &checkView{out: stdout, repair: request.Repair}
	if f, ok := stdout.(*os.File); ok && isTerminal(f) {
		v.progress = true
	}
	tell := v.tell
	if flag("json").(bool) {
		enc := json.NewEncoder(stdout)
		v.progress = false
		tell = func(e check.Event) error {
			v.count(e)
			return enc.Encode(e)
		}
	}
	if err := doCheck(ctx, c, request, tell); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("interrupted after %d of %d files", v.last.DoneFiles, v.last.Files)
		}
		return uncheckedError{errors.Join(err, v.clear())}
	}
	switch {
	case v.found == v.repaired:
		return nil
	case !request.Repair:
		return errors.New(faults(v.found))
	}
	return fmt.Errorf("%d of %s not repaired", v.found-v.repaired, faults(v.found))
}

// doCheck has gantryd check, or checks here if there is none.
func doCheck(ctx context.Context, c *config.Config, r check.Request, tell func(check.Event) error) (err error) {
	if err := reachable(ctx, c.Address); err != nil {
		err = plugin.Check(ctx, c, r, tell)
		if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
			return fmt.Errorf("it has to be run by root: %w", err)
		}
		if errdefs.IsFailedPrecondition(err) {
			err = fmt.Errorf("no gantryd answers at %s, but: %w", c.Address, err)
		}
		return err
	}
	conn, err := grpc.NewClient("unix://"+c.Address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	// It tells at once that it has begun, and goes on telling how far it is.
	ctx, heard := untilSilent(ctx)
	defer heard()
	err = check.Call(ctx, conn, r, func(e check.Event) error {
		heard()
		return tell(e)
	})
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errNoAnswer) {
			err = cause
		}
		if status.Code(err) == codes.Unimplemented {
			return fmt.Errorf("the gantryd at %s is of an older version that cannot check: restart it with the new one, or stop it and repeat this", c.Address)
		}
		return fmt.Errorf("gantryd at %s: %w", c.Address, err)
	}
	return nil
}

// checkView tells a person what is found.
type checkView struct {
	out      io.Writer
	progress bool // a terminal, where a line can be drawn again
	repair   bool

	drawn           bool
	last            check.Event
	found, repaired int
}

func (v *checkView) count(e check.Event) {
	v.last = e
	switch e.State {
	case check.Found:
		v.found++
	case check.Repaired:
		v.repaired++
	}
}

// clear takes the line of progress away.
func (v *checkView) clear() error {
	if !v.drawn {
		return nil
	}
	v.drawn = false
	return print(v.out, "\r\x1b[K")
}

func (v *checkView) tell(e check.Event) error {
	v.count(e)
	text := checkLine(e)
	if e.State == check.Ended {
		text = checkSummary(e, v.found, v.repaired, v.repair)
	}
	if text != "" {
		return errors.Join(v.clear(), print(v.out, text))
	}
	if !v.progress {
		return nil
	}
	v.drawn = true
	return print(v.out, fmt.Sprintf("\r\x1b[K%d of %d files, %s of %s read, %s", e.DoneFiles, e.Files, amount(e.DoneBytes), amount(e.Bytes), faults(v.found)))
}

// checkLine is an event for people, one line each; "" for mere progress.
func checkLine(e check.Event) string {
	switch {
	case e.Note != "":
		return "note: " + oneLine(e.Note) + "\n"
	case e.Fault == nil:
		return ""
	case e.State == check.Repaired:
		return fmt.Sprintf("repaired: %s %s: %s\n", e.Fault.What, e.Fault.Where, oneLine(e.Fault.Cure))
	case e.State == check.Failed:
		return fmt.Sprintf("not repaired: %s %s: %s\n", e.Fault.What, e.Fault.Where, oneLine(e.Fault.Cure))
	}
	affected := ""
	if len(e.Fault.Affected) > 0 {
		affected = " Affected: " + strings.Join(e.Fault.Affected, ", ") + "."
	}
	return fmt.Sprintf("fault: %s %s: %s: %s.%s Cure: %s\n", e.Fault.What, e.Fault.Where, oneLine(e.Fault.Problem), e.Fault.Meaning, affected, oneLine(e.Fault.Cure))
}

func oneLine(s string) string { return strings.ReplaceAll(s, "\n", "; ") }

func checkSummary(e check.Event, found, repaired int, repair bool) string {
	read := fmt.Sprintf("%d files checked, %s read: ", e.DoneFiles, amount(e.DoneBytes))
	switch {
	case found == 0:
		return read + "no faults\n"
	case !repair:
		return fmt.Sprintf("%s%s\n", read, faults(found))
	}
	return fmt.Sprintf("%s%s, %d repaired\n", read, faults(found), repaired)
}

func faults(n int) string {
	if n == 1 {
		return "1 fault"
	}
	return fmt.Sprintf("%d faults", n)
}
