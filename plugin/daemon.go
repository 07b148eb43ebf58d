package plugin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	cplugin "github.com/containerd/plugin"
	"github.com/coreos/go-systemd/v22/activation"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/snapshotter/layer"
)

const (
	// drainFor is how long calls under way may go on after a stop was asked for.
	// systemd's default patience is 90 seconds, containerd's clients retry at once.
	drainFor = 10 * time.Second
	// abandonAfter is how long calls that were cancelled may take to return.
	abandonAfter = 5 * time.Second
	// sweepEvery is how often what nobody needs is removed.
	sweepEvery = 10 * time.Minute
	// unusedFor is how long a layer file that no snapshot links is kept: a pull
	// adopts its layers one after the other.
	unusedFor = 30 * time.Minute
)

// Daemon is a gantryd: its parts, and the server that containerd calls.
type Daemon struct {
	config *config.Config
	place  *place
	passed []*os.File        // by systemd, until Run looks at them
	parts  []*cplugin.Plugin // in the order of their start
	server *grpc.Server
	edge   *edge
	cancel context.CancelCauseFunc // ends what the parts run by themselves
	closed sync.Once
}

// New makes a daemon and all its parts, without listening yet. The logger of ctx
// goes to the parts; its end does not. Whoever gets a Daemon closes it.
func New(ctx context.Context, c *config.Config) (*Daemon, error) {
	passed := activation.Files(true) // first, so that no program that a part starts inherits them
	p, err := occupy(c)
	if err != nil {
		turnAway(ctx, passed)
		return nil, err
	}
	scope, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	d := &Daemon{config: c, place: p, passed: passed, cancel: cancel}
	d.server, d.edge = newServer(log.G(ctx))
	if err := d.start(scope); err != nil {
		turnAway(ctx, passed)
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// start makes the parts in the order of what they require.
func (d *Daemon) start(ctx context.Context) error {
	set := cplugin.NewPluginSet()
	for _, r := range registrations().Graph(nil) {
		began := time.Now()
		ic := cplugin.NewContext(ctx, set, map[string]string{
			plugins.PropertyRootDir:     d.config.Root,
			plugins.PropertyStateDir:    d.config.State,
			plugins.PropertyGRPCAddress: d.config.Address,
		})
		ic.Config = &settings{d.config, d.edge.calls}
		p := r.Init(ic)
		instance, err := p.Instance()
		if err != nil {
			return fmt.Errorf("start %s: %w", r.URI(), err)
		}
		d.parts = append(d.parts, p)
		if err := set.Add(p); err != nil {
			return err
		}
		if add, ok := instance.(service); ok {
			add(d.server)
		}
		log.G(ctx).WithFields(log.Fields{"id": r.URI(), "t": time.Since(began)}).Debug("started")
	}
	return nil
}

// Run listens and serves until ctx ends, then drains: no new calls, those under
// way get drainFor. It returns nil after a drain, even if calls were cut off.
// Close is still to be called.
func (d *Daemon) Run(ctx context.Context) error {
	l, err := listen(ctx, d.config.Address, d.passed)
	d.passed = nil
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	var failed error
	wg.Go(func() {
		defer cancel()
		// Serve returns nil once the server was stopped.
		if err := d.server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			failed = fmt.Errorf("serve on %s: %w", d.config.Address, err)
		}
	})
	wg.Go(func() { d.sweep(ctx) })
	wg.Go(func() { d.feedWatchdog(ctx) })
	log.G(ctx).WithFields(log.Fields{"address": d.config.Address, "root": d.config.Root, "version": config.Version}).Info("serving")
	notify(ctx, "READY=1")

	<-ctx.Done()
	notify(context.WithoutCancel(ctx), "STOPPING=1")
	d.drain(context.WithoutCancel(ctx))
	wg.Wait()
	return failed
}

// drain ends the server. Transfers and unpacks end in Close.
func (d *Daemon) drain(ctx context.Context) {
	log.G(ctx).Info("stopping: no new calls are accepted")
	d.edge.stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		d.server.GracefulStop()
	}()
	timer := time.NewTimer(drainFor)
	defer timer.Stop()
	select {
	case <-done:
		return
	case <-timer.C:
	}
	log.G(ctx).Warnf("calls are still under way after %s and are cut off; a retried pull goes on from where they were", drainFor)
	d.server.Stop()
	if !d.edge.idle(abandonAfter) {
		log.G(ctx).Errorf("calls have not returned %s after they were cut off", abandonAfter)
	}
}

// Close stops the parts in the opposite order of their start and gives up the
// folders. Partial transfers are saved. A second call does nothing.
func (d *Daemon) Close() error {
	var errs []error
	d.closed.Do(func() {
		d.server.Stop() // nothing to do after Run
		for _, p := range slices.Backward(d.parts) {
			instance, err := p.Instance()
			if c, ok := instance.(io.Closer); ok && err == nil {
				if err := c.Close(); err != nil {
					errs = append(errs, fmt.Errorf("stop %s: %w", p.Registration.URI(), err))
				}
			}
		}
		d.cancel(errors.New("gantryd has stopped"))
		errs = append(errs, d.place.release())
	})
	return errors.Join(errs...)
}

// instance returns the one part of a type.
func instance[T any](d *Daemon, t cplugin.Type) (T, bool) {
	for _, p := range d.parts {
		if p.Registration.Type == t {
			v, err := p.Instance()
			typed, ok := v.(T)
			return typed, ok && err == nil
		}
	}
	var none T
	return none, false
}

// sweep removes, now and then, transfers and layer files that nobody needs.
func (d *Daemon) sweep(ctx context.Context) {
	ticker := time.NewTicker(sweepEvery)
	defer ticker.Stop()
	for {
		if t, ok := instance[*transfers](d, TransferPlugin); ok {
			logSweep(ctx, filepath.Base(d.config.Transfer.Root), t.sweep(ctx))
		}
		if l, ok := instance[*layer.Cache](d, LayerPlugin); ok {
			logSweep(ctx, "layers", l.Sweep(ctx, unusedFor))
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

func logSweep(ctx context.Context, what string, err error) {
	if err != nil && ctx.Err() == nil {
		log.G(ctx).WithError(err).Warnf("sweeping %s", what)
	}
}
