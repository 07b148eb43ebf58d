package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	cplugin "github.com/containerd/plugin"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/plugin/check"
	"github.com/gantryd/gantry/plugin/pull"
	"github.com/gantryd/gantry/snapshotter"
	"github.com/gantryd/gantry/snapshotter/layer"
)

const (
	// lookAgain is how long a check waits before it looks again at what seemed wrong.
	lookAgain = time.Second
	// strayAfter is how old a file must be that belongs to nobody.
	strayAfter = time.Hour
	// tellEvery is how often a check tells how far it is.
	tellEvery = 250 * time.Millisecond
)

// checker verifies all that a gantryd keeps. It takes no lock while it reads, so nobody waits for it; what looks wrong
// counts only if it is still there, and still wrong, when nobody is about to change it.
type checker struct {
	store      *content.Store
	layers     *layer.Cache
	snapshots  *snapshotter.Snapshotter // nil: its database cannot be read
	transfers  *transfers
	puller     *pull.Puller
	containerd *containerd
	address    string // gantryd's, as containerd has to have it
	alone      bool   // no gantryd runs; its database was verified
}

var _ check.Server = (*checker)(nil)

func newChecker(ic *cplugin.InitContext) (c *checker, err error) {
	c = &checker{address: configOf(ic).Address}
	if c.transfers, err = part[*transfers](ic, TransferPlugin); err != nil {
		return nil, err
	}
	if c.puller, err = part[*pull.Puller](ic, PullPlugin); err != nil {
		return nil, err
	}
	if c.containerd, err = part[*containerd](ic, ContainerdPlugin); err != nil {
		return nil, err
	}
	if c.layers, err = part[*layer.Cache](ic, LayerPlugin); err != nil {
		return nil, err
	}
	if c.snapshots, err = part[*snapshotter.Snapshotter](ic, plugins.SnapshotPlugin); err != nil {
		return nil, err
	}
	c.store, err = part[*content.Store](ic, plugins.ContentPlugin)
	return c, err
}

// repair does something about a fault and says what it did.
type repair func(ctx context.Context) (did string, err error)

// finding is a fault and its repair.
type finding struct {
	check.Fault
	order  int // repairs with lower numbers come first
	repair repair
}

// The order of repairs: each needs what the ones before it bring back.
const (
	orderDatabase = iota
	orderTransfer
	orderBlob
	orderLayer
	orderSnapshot
	orderRest
)

// checking is one run.
type checking struct {
	*checker
	known *known // nil: containerd does not answer
	send  func(check.Event) error

	mu       sync.Mutex // held while sending
	event    check.Event
	findings []*finding
	renewed  map[digest.Digest]error // layers that several findings share
	pins     []func()                // undo the pins of layers that were made anew

	badLayers map[digest.Digest]bool
	verified  []fs.FileInfo // files whose digest was compared
}

// Run implements check.Server.
func (c *checker) Run(ctx context.Context, r check.Request, send func(check.Event) error) error {
	run := &checking{
		checker: c, send: send, event: check.Event{State: check.Progress},
		badLayers: map[digest.Digest]bool{}, renewed: map[digest.Digest]error{},
	}
	if err := run.tell(nil); err != nil {
		return err
	}
	var err error
	if run.known, err = c.containerd.survey(ctx, c.store, c.address); err != nil && ctx.Err() == nil {
		run.event.Note = fmt.Sprintf("no images are named, nothing is compared with what containerd knows and nothing can be fetched again: %s", err.Error())
		if err := run.tell(nil); err != nil {
			return err
		}
		run.event.Note = ""
	}
	if err := run.look(ctx, r.Workers); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	if r.Repair {
		if err := run.repairAll(ctx); err != nil {
			return err
		}
	}
	run.event.State = check.Ended
	return run.tell(nil)
}

// tell sends an event with the counts so far.
func (c *checking) tell(change func(e *check.Event)) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.event
	if change != nil {
		change(&e)
	}
	return c.send(e)
}

// count adds to what was read.
func (c *checking) count(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.event.DoneBytes += n
}

// report notes a fault and tells it.
func (c *checking) report(f finding) error {
	c.mu.Lock()
	c.findings = append(c.findings, &f)
	c.mu.Unlock()
	return c.tell(func(e *check.Event) { e.State, e.Fault = check.Found, &f.Fault })
}

// look finds all faults.
func (c *checking) look(ctx context.Context, workers int) error {
	jobs, err := c.jobs(ctx)
	if err != nil {
		return err
	}
	if workers <= 0 {
		workers = runtime.GOMAXPROCS(0)
	}
	stop := c.keepTelling(ctx)
	defer stop()
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(workers)
	for _, j := range jobs {
		if each.Err() != nil {
			break
		}
		g.Go(func() error {
			err := j.run(each)
			c.mu.Lock()
			defer c.mu.Unlock()
			c.event.DoneFiles++
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	// What was read says which of the rest has been reported already.
	return errors.Join(c.checkSnapshots(ctx), c.checkTransfers(ctx), c.checkKnown(ctx), c.checkForgotten(ctx), c.checkStrays(ctx))
}

// keepTelling sends the counts now and then, until the function that it returns is called.
func (c *checking) keepTelling(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		ticker := time.NewTicker(tellEvery)
		defer ticker.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticker.C:
				if c.tell(nil) != nil {
					return // who sends a fault gets the error too
				}
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// job is one file to read.
type job struct {
	run func(ctx context.Context) error
}

func (c *checking) jobs(ctx context.Context) ([]job, error) {
	var jobs []job
	add := func(size int64, run func(ctx context.Context) error) {
		jobs = append(jobs, job{run})
		c.event.Files++
		c.event.Bytes += size
	}
	if c.snapshots != nil && !c.alone {
		add(0, c.checkDatabase)
	}
	for _, f := range c.store.Files() {
		if f.Discarded {
			add(0, func(ctx context.Context) error { return c.checkRecord(ctx, f) })
			continue
		}
		add(f.Size, func(ctx context.Context) error { return c.checkBlob(ctx, f) })
	}
	files, err := c.layerFiles(ctx)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		add(f.Size, func(ctx context.Context) error { return c.checkLayer(ctx, f) })
	}
	return jobs, c.tell(nil)
}

// layerFiles are all layer files, once each: those with a name, and those that snapshots link and that have lost theirs.
func (c *checking) layerFiles(ctx context.Context) ([]snapshotter.LayerFile, error) {
	named, _, err := c.layers.Files()
	if err != nil {
		return nil, err
	}
	var linked []snapshotter.LayerFile
	if c.snapshots != nil {
		if linked, err = c.snapshots.LayerFiles(ctx); err != nil {
			return nil, fmt.Errorf("the snapshots' layer files: %w", err)
		}
	}
	of := map[digest.Digest][]snapshotter.LayerFile{}
	for _, l := range linked {
		of[l.DiffID] = append(of[l.DiffID], l)
	}
	var all []snapshotter.LayerFile
	for _, d := range named {
		path, err := c.layers.Path(d)
		if err != nil {
			return nil, err
		}
		f := snapshotter.LayerFile{DiffID: d, Path: path}
		fi, err := os.Stat(path)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			continue // swept meanwhile
		case err == nil: // else whoever reads it sees the error
			f.Size = fi.Size()
		}
		of[d] = slices.DeleteFunc(of[d], func(l snapshotter.LayerFile) bool {
			lfi, err := os.Stat(l.Path)
			same := err == nil && os.SameFile(lfi, fi)
			if same {
				f.IDs, f.Keys = l.IDs, l.Keys
			}
			return same
		})
		all = append(all, f)
	}
	for _, l := range linked {
		if slices.ContainsFunc(of[l.DiffID], func(o snapshotter.LayerFile) bool { return o.Path == l.Path }) {
			all = append(all, l)
		}
	}
	return all, nil
}

// wrong hashes a file twice if need be and says what is wrong with it; "" for nothing. held says whether the file that
// was read is still the one in question.
func (c *checking) wrong(ctx context.Context, path string, d digest.Digest, held func(fs.FileInfo) bool) (string, error) {
	problem := ""
	for range 2 { // what a second look does not confirm is not told
		got, fi, err := check.Hash(ctx, path, d.Algorithm(), c.count)
		switch {
		case ctx.Err() != nil:
			return "", context.Cause(ctx)
		case ownTrouble(err):
			return "", fmt.Errorf("read %s: %w", path, err)
		case err == nil && got == d:
			c.mu.Lock()
			defer c.mu.Unlock()
			c.verified = append(c.verified, fi)
			return "", nil
		case errors.Is(err, fs.ErrNotExist):
			problem, fi = "the file is gone", nil
		case err != nil:
			problem = fmt.Sprintf("the file cannot be read: %s", err.Error())
		default:
			problem = fmt.Sprintf("its %d bytes have the digest %s", fi.Size(), got)
		}
		if errors.Is(err, fs.ErrNotExist) || fi != nil {
			if !held(fi) {
				return "", nil // deleted or replaced meanwhile
			}
		}
	}
	return problem, nil
}

// ownTrouble says whether an error is about this process and says nothing about the file.
func ownTrouble(err error) bool {
	return errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) || errors.Is(err, syscall.ENOMEM)
}

func (c *checking) repairAll(ctx context.Context) error {
	defer func() {
		for _, unpin := range c.pins {
			unpin()
		}
	}()
	slices.SortStableFunc(c.findings, func(a, b *finding) int { return a.order - b.order })
	for _, f := range c.findings {
		did, err := "", error(fmt.Errorf("there is no repair for it: %w", errdefs.ErrNotImplemented))
		if f.repair != nil {
			did, err = f.repair(ctx)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		state, fault := check.Repaired, f.Fault
		fault.Cure = did
		if err != nil {
			state, fault.Cure = check.Failed, fmt.Sprintf("%s; %s", err.Error(), f.Cure)
		}
		if err := c.tell(func(e *check.Event) { e.State, e.Fault = state, &fault }); err != nil {
			return err
		}
	}
	return nil
}
