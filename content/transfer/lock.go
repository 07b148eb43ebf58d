package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/gofrs/flock"
)

// How often a waiter looks whether the lock is free.
const (
	lockPollMin = 20 * time.Millisecond
	lockPollMax = 500 * time.Millisecond
)

// tryLock takes the lock of a folder, exclusively or shared; nil without an error if somebody else has it.
// A lock file that was unlinked meanwhile guards nothing: then the new one is tried.
func tryLock(root, name string, shared bool) (*flock.Flock, error) {
	for {
		l := flock.New(filepath.Join(root, locksName, name))
		try := l.TryLock
		if shared {
			try = l.TryRLock
		}
		if ok, err := try(); !ok || err != nil {
			return nil, errors.Join(err, l.Close())
		}
		ours, err := l.Stat()
		if err != nil {
			return nil, errors.Join(err, l.Close())
		}
		named, err := os.Stat(l.Path())
		if err == nil && os.SameFile(ours, named) {
			return l, nil
		}
		if err := errors.Join(notMissing(err), l.Close()); err != nil {
			return nil, err
		}
	}
}

func notMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// holding is a lock and the folder it guards.
type holding struct {
	lock   *flock.Flock
	name   string
	shared bool // another process uses the finished blob too: read only
}

// lockFolder waits until this transfer may work in its folder. If another process has finished the blob, a
// shared lock is enough, unless exclusive is set. It fails when the holder makes no progress for giveUp.
func lockFolder(ctx context.Context, root string, b Blob, exclusive bool, giveUp time.Duration, waiting func(name string)) (*holding, error) {
	var watch progressWatch
	for poll := lockPollMin; ; poll = min(2*poll, lockPollMax) {
		name := folderName(root, b)
		h, err := tryHold(root, name, exclusive)
		if err != nil {
			return nil, fmt.Errorf("lock %s: %w", name, err)
		}
		switch {
		case h != nil && folderName(root, b) == name:
			return h, nil
		case h != nil: // taken by the other size between the look and the lock
			if err := h.lock.Close(); err != nil {
				return nil, err
			}
			continue
		}
		waiting(name)
		if idle := watch.idle(filepath.Join(root, name, stateName)); idle >= giveUp {
			return nil, fmt.Errorf("another process holds %s and made no progress for %s: %w", filepath.Join(root, locksName, name), idle, errdefs.ErrUnavailable)
		}
		if err := sleep(ctx, poll); err != nil {
			return nil, err
		}
	}
}

func tryHold(root, name string, exclusive bool) (*holding, error) {
	l, err := tryLock(root, name, false)
	if l != nil || err != nil {
		return &holding{lock: l, name: name}, err
	}
	if exclusive {
		return nil, nil
	}
	if !peekComplete(root, name) {
		return nil, nil
	}
	l, err = tryLock(root, name, true)
	if l == nil || err != nil {
		return nil, err
	}
	return &holding{lock: l, name: name, shared: true}, nil
}

// progressWatch tells for how long a lock's holder has recorded nothing.
type progressWatch struct {
	size  int64
	since time.Time
}

func (w *progressWatch) idle(path string) time.Duration {
	var size int64
	if st, err := os.Stat(path); err == nil {
		size = st.Size()
	}
	if w.since.IsZero() || size != w.size {
		w.size, w.since = size, time.Now()
	}
	return time.Since(w.since)
}

// sleep waits for d or until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
