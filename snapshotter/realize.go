package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io"
	iofs "io/fs"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/snapshotter/erofs"
	"github.com/gantryd/gantry/snapshotter/layer"
)

// readyTries bounds how often somebody else may take a mount away.
const readyTries = 5

// ready returns when each committed snapshot of a chain (nearest first) shows
// its layer. It looks at what is there, so a mount that somebody took away is
// made again. Missing ones are mounted in parallel.
func (s *Snapshotter) ready(ctx context.Context, chain []string) error {
	for range readyTries {
		var jobs []*job
		for i, id := range chain {
			if !s.isReady(id) {
				jobs = append(jobs, s.schedule(id, chain[i+1:]))
			}
		}
		if len(jobs) == 0 {
			return nil
		}
		// A job under way may have looked before the mount went: look again.
		if err := waitAll(ctx, jobs); err != nil {
			return err
		}
	}
	return fmt.Errorf("layers of snapshots %v are unmounted as soon as they are mounted: %w", chain, errdefs.ErrUnavailable)
}

func (s *Snapshotter) isReady(id string) bool {
	if s.tars.has(id) {
		if s.mounted(id) {
			return true
		}
		s.tars.forget(id) // it may be made a directory, if it cannot be mounted again
	}
	switch {
	case exists(s.pending(id)):
		return false
	case !s.isTar(id):
		return exists(s.upper(id))
	case !s.mounted(id):
		return false
	}
	s.tars.add(id)
	return true
}

// tarLayers remembers which committed snapshots isReady found to be tar layers with nothing pending. They stay that,
// and each Prepare and Mounts would look for the same files of a whole chain again. What may change, the mount, is looked
// at each time. dropLayer and discard, which take the files away, forget the layer, and so does isReady if its mount is gone.
type tarLayers struct{ ids sync.Map }

func (t *tarLayers) add(id string)    { t.ids.Store(id, nil) }
func (t *tarLayers) forget(id string) { t.ids.Delete(id) }

func (t *tarLayers) has(id string) bool {
	_, ok := t.ids.Load(id)
	return ok
}

// settled waits for those ancestors whose directories are what other layers
// read attributes from: all of them in directory mode, else the few that were
// extracted without knowing their parent.
func (s *Snapshotter) settled(ctx context.Context, chain []string) error {
	if s.mode == ModeDirectory {
		return s.ready(ctx, chain)
	}
	var jobs []*job
	for i, id := range chain {
		if exists(s.pending(id)) {
			jobs = append(jobs, s.schedule(id, chain[i+1:]))
		}
	}
	return waitAll(ctx, jobs)
}

// schedule has the worker make a committed snapshot's layer visible.
func (s *Snapshotter) schedule(id string, parents []string) *job {
	return s.work.once(id, func(ctx context.Context) error {
		// Before the slot: an ancestor's job may need one.
		if err := s.settled(ctx, parents); err != nil {
			return err
		}
		release, err := s.work.slot(ctx)
		if err != nil {
			return err
		}
		defer release()
		unlock, err := s.locks.lock(ctx, id)
		if err != nil {
			return err
		}
		defer unlock()
		if err := s.realize(ctx, id, parents); err != nil {
			return fmt.Errorf("layer of snapshot %s: %w", id, err)
		}
		return nil
	})
}

// realize is called with the lock of id held.
func (s *Snapshotter) realize(ctx context.Context, id string, parents []string) error {
	if !s.isTar(id) {
		if err := s.mountCommitted(ctx, id); err != nil {
			return err
		}
	}
	switch {
	case exists(s.pending(id)):
		return s.settle(ctx, id, parents)
	case !s.isTar(id):
		if !exists(s.upper(id)) {
			return fmt.Errorf("%s is gone; remove the image and pull it again: %w", s.dir(id), errdefs.ErrDataLoss)
		}
		return nil
	case s.mounted(id):
		return s.tidy(ctx, id)
	case s.mode == ModeDirectory:
		return s.extractCommitted(ctx, id, parents)
	}
	if err := s.ensureIndex(ctx, id, parents); err != nil {
		return err
	}
	if err := s.mountLayer(ctx, id); err != nil {
		return err
	}
	return s.tidy(ctx, id)
}

// tidy removes what a tar layer has no use for once it is committed. A directory
// that is not empty stays: it is no layer's content.
func (s *Snapshotter) tidy(ctx context.Context, id string) error {
	if err := errors.Join(removeFile(s.lowestIndex(id)), removeFile(s.onlyLowest(id))); err != nil {
		return err
	}
	if empty, err := isEmpty(s.upper(id)); err != nil {
		return err
	} else if empty {
		if err := s.dropUpperFile(ctx, id); err != nil {
			return err
		}
	}
	for _, d := range []string{s.upper(id), s.workdir(id)} {
		if err := removeFile(d); err != nil && !errors.Is(err, unix.ENOTEMPTY) && !errors.Is(err, unix.EBUSY) {
			return err
		}
	}
	return nil
}

// ensureIndex verifies the index, and makes it again from the tar if need be.
func (s *Snapshotter) ensureIndex(ctx context.Context, id string, parents []string) error {
	if len(parents) == 0 && !exists(s.index(id)) {
		// Adopt guessed that nothing would come below.
		if err := os.Rename(s.lowestIndex(id), s.index(id)); err != nil && !errors.Is(err, iofs.ErrNotExist) {
			return err
		}
	}
	err := verifyIndex(s.index(id))
	if err == nil {
		return nil
	}
	if !errors.Is(err, iofs.ErrNotExist) {
		log.G(ctx).WithError(err).WithField("snapshot", id).Warn("snapshotter: index is damaged, writing it again from the layer")
	}
	start := time.Now()
	a, err := s.checkLayer(id)
	if err != nil {
		return err
	}
	table, err := s.table(ctx, id, s.layer(id))
	if err != nil {
		return err
	}
	root, err := table.Index(s.parents(ctx, parents))
	if err != nil {
		return err
	}
	if err := s.writeIndex(s.index(id), id, root, a.size); err != nil {
		return err
	}
	s.adopted(id, a.diffID, start)
	return nil
}

func verifyIndex(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	return erofs.Verify(f, fi.Size())
}

// writeIndex needs no fsync: the index is checked before each mount.
func (s *Snapshotter) writeIndex(name, id string, root *erofs.Inode, size int64) error {
	l, err := os.Open(s.layer(id))
	if err != nil {
		return err
	}
	defer l.Close()
	return writeFile(name, false, func(w io.Writer) error {
		return erofs.Write(w, root, erofs.Device{ReaderAt: l, Size: size})
	})
}

// earlyIndex returns the index of a layer before Commit, or nil when the parent
// matters and is not known: an active snapshot without a parent is either a
// lowest layer or one that Commit will rebase. They differ in implied
// directories and in whiteouts, so a layer with neither is the same in both.
func (s *Snapshotter) earlyIndex(ctx context.Context, snap storage.Snapshot, table *layer.Table) (*erofs.Inode, error) {
	if len(snap.ParentIDs) > 0 {
		return table.Index(s.parents(ctx, snap.ParentIDs))
	}
	if table.Implies() || exists(s.onlyLowest(snap.ID)) {
		return nil, nil
	}
	root, err := table.Index([]layer.Parent{nothing{}})
	if err != nil || hasWhiteouts(root) {
		return nil, err
	}
	return root, nil
}

// nothing is a parent without entries: with it an index keeps its whiteouts.
type nothing struct{}

func (nothing) Lookup(string) (layer.Attr, layer.Kind, error) {
	return layer.Attr{}, layer.Absent, nil
}

func hasWhiteouts(n *erofs.Inode) bool {
	if n.Mode&unix.S_IFMT == unix.S_IFCHR && n.Rdev == 0 {
		return true
	}
	if n.Xattrs["trusted.overlay.opaque"] != "" {
		return true
	}
	for _, c := range n.Children {
		if hasWhiteouts(c.Inode) {
			return true
		}
	}
	return false
}

// table returns the entries of the tar that a snapshot links as name.
func (s *Snapshotter) table(ctx context.Context, id, name string) (*layer.Table, error) {
	a, err := s.readRecord(id)
	if err != nil {
		return nil, err
	}
	unpin := s.layers.Pin(a.diffID)
	defer unpin()
	l, err := s.layers.Get(ctx, a.diffID)
	if err == nil {
		return l.Table, nil
	}
	if !errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("layer %s: %w", a.diffID, err)
	}
	// Gone from the cache; the snapshot's own link is the same file.
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	t, err := layer.Scan(ctx, f)
	if err != nil {
		return nil, fmt.Errorf("layer %s: %w", a.diffID, err)
	}
	return t, nil
}

// parents returns ancestors as what an index takes implied directories from.
// Their tables are read when the first such directory is looked up.
func (s *Snapshotter) parents(ctx context.Context, ids []string) []layer.Parent {
	parents := make([]layer.Parent, len(ids))
	for i, id := range ids {
		parents[i] = lazyParent(sync.OnceValues(func() (layer.Parent, error) {
			if s.isTar(id) {
				return s.table(ctx, id, s.layer(id))
			}
			if err := s.openCommitted(ctx, id); err != nil {
				return nil, err
			}
			return layer.DirParent(s.upper(id)), nil
		}))
	}
	return parents
}

type lazyParent func() (layer.Parent, error)

func (p lazyParent) Lookup(path string) (layer.Attr, layer.Kind, error) {
	parent, err := p()
	if err != nil {
		return layer.Attr{}, 0, err
	}
	return parent.Lookup(path)
}
