package plugin

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	cplugin "github.com/containerd/plugin"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/plugin/check"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/setup"
	"github.com/gantryd/gantry/snapshotter"
	"github.com/gantryd/gantry/snapshotter/layer"
)

// Check checks the stores that c configures where no gantryd runs, and keeps one from starting meanwhile. Without repair
// it changes nothing, and what it reads may be read-only. With repair it is a gantryd that nobody can call.
// errdefs.ErrFailedPrecondition: a gantryd runs. errdefs.ErrNotFound: there is nothing to check.
func Check(ctx context.Context, c *config.Config, r check.Request, send func(check.Event) error) (err error) {
	p, err := hold(c)
	if err != nil {
		return err
	}
	if r.Repair {
		// Tells at once what a daemon would stumble over.
		if err = p.release(); err == nil {
			p, err = occupy(c)
		}
		if errors.Is(err, syscall.EROFS) {
			err = fmt.Errorf("%w: nothing can be repaired before it is mounted to be written; gantry check without --repair works", err)
		}
		if err != nil {
			return err
		}
	}
	broken, err := checkClosedDatabase(ctx, c.Root, r.Repair, send)
	if err == nil && !r.Repair {
		err = checkClosed(ctx, c, broken, r, send)
	}
	if err = errors.Join(err, p.release()); err != nil || !r.Repair {
		return err
	}
	d, err := New(ctx, c)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	run, ok := d.checker()
	if !ok {
		return fmt.Errorf("a part is missing: %w", errdefs.ErrInternal)
	}
	return run.Run(ctx, r, send)
}

// checker makes one of the daemon's parts.
func (d *Daemon) checker() (*checker, bool) {
	c := &checker{address: d.config.Address, alone: true}
	all := []bool{
		take(d, ContainerdPlugin, &c.containerd), take(d, LayerPlugin, &c.layers), take(d, TransferPlugin, &c.transfers),
		take(d, PullPlugin, &c.puller), take(d, plugins.ContentPlugin, &c.store), take(d, plugins.SnapshotPlugin, &c.snapshots),
	}
	return c, !slices.Contains(all, false)
}

func take[T any](d *Daemon, t cplugin.Type, to *T) (ok bool) {
	*to, ok = instance[T](d, t)
	return ok
}

// checkClosedDatabase looks at the snapshots' database before anybody opens it: what it cannot read keeps gantryd from
// starting.
func checkClosedDatabase(ctx context.Context, root string, repair bool, send func(check.Event) error) (broken bool, err error) {
	err = snapshotter.VerifyDatabase(root)
	if err == nil || !errdefs.IsDataLoss(err) {
		return false, err
	}
	f := databaseFault(err, "gantry check --repair goes back to the copy that gantryd saved last")
	f.Where = filepath.Join(root, f.Where)
	if err := send(check.Event{State: check.Found, Fault: &f.Fault}); err != nil || !repair {
		return true, err
	}
	saved, lost, err := snapshotter.RestoreDatabase(ctx, root)
	if err != nil {
		return true, fmt.Errorf("restore the database: %w", err)
	}
	state := check.Repaired
	f.Cure = fmt.Sprintf("it is again as it was saved at %s", saved.Format("2006-01-02 15:04:05"))
	if lost > 0 && !saved.IsZero() {
		f.Cure += ". Images that were pulled and containers that were made since are not in it: start gantryd, remove those containers, run gantry check --repair once more, and pull those images again"
	}
	if saved.IsZero() {
		state = check.Failed
		f.Cure = "there was no good copy, so it is empty: start gantryd, remove all containers, run gantry check --repair once more, and pull the images again"
	}
	if lost > 0 {
		f.Cure += fmt.Sprintf("; %d folders of snapshots that it does not know are in %s, with what containers wrote: remove them when nobody needs them", lost, filepath.Join(root, "lost"))
	}
	return false, send(check.Event{State: state, Fault: &f.Fault})
}

// checkClosed checks stores that are opened for that alone.
func checkClosed(ctx context.Context, c *config.Config, broken bool, r check.Request, send func(check.Event) error) (err error) {
	run := &checker{address: c.Address, alone: true}
	closing := func(close func() error) { err = errors.Join(err, close()) }
	if run.containerd, err = dialContainerd(c.Containerd.Address); err != nil {
		return err
	}
	defer closing(run.containerd.Close)
	if run.layers, err = layer.Open(filepath.Join(c.Root, "layers"), layer.Options{ReadOnly: true}); err != nil {
		return err
	}
	o := setup.TransferOptions(c)
	o.ReadOnly = true
	if run.transfers, err = openTransfersWith(c, o); err != nil {
		return err
	}
	defer closing(run.transfers.Close)
	if run.store, err = content.NewStore(c.Content.Root, content.Options{ReadOnly: true}); err != nil {
		return err
	}
	defer closing(run.store.Close)
	if !broken {
		run.snapshots, err = snapshotter.Inspect(ctx, c.Root, run.layers)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if err == nil {
			defer closing(run.snapshots.Close)
		}
	}
	return run.Run(ctx, r, send)
}
