package transfer

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/gofrs/flock"
)

// How often a waiter looks at the folder it waits for: often while something moves there.
const (
	lockPollMin = 20 * time.Millisecond
	lockPollMax = 500 * time.Millisecond
)

// tryLock takes the lock of a folder, exclusively or shared; nil without an error if somebody else has it.
// A lock file that was unlinked meanwhile guards nothing: then the new one is tried.
func tryLock(root, name string, shared bool) (*flock.Flock, error) {
	for {
		l := flock.New(lockPath(root, name))
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

func lockPath(root, name string) string { return filepath.Join(root, locksName, name) }

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
	shared bool // the folder is finished and others may use it too: read only
}

// tryExclusive takes a folder to work in it; nil without an error if somebody uses it.
func tryExclusive(root, name string) (*holding, error) {
	l, err := tryLock(root, name, false)
	if l == nil || err != nil {
		return nil, err
	}
	return &holding{lock: l, name: name}, nil
}

// tryShared takes a finished folder to use what is in it; nil without an error if its holder is still at work.
func tryShared(root, name string) (*holding, error) {
	l, err := tryLock(root, name, true)
	if l == nil || err != nil {
		return nil, err
	}
	return &holding{lock: l, name: name, shared: true}, nil
}

// drop gives up a folder that holds nothing worth keeping.
func (h *holding) drop(path string) error {
	// Whoever opened the lock file before sees after locking it that its name is gone.
	return errors.Join(os.RemoveAll(path), notMissing(os.Remove(h.lock.Path())), h.lock.Close())
}

// vigil tells for how long a folder's holder has shown no sign of life: no new record, and no beat, which is a new
// time on the lock file.
type vigil struct {
	size        int64
	state, lock time.Time
	since       time.Time // of the last sign
}

// idle is the time since the last sign of life. On the first look it believes the times of the files, up to credit:
// whoever just took the lock has had no time to give a sign.
func (v *vigil) idle(root, name string, credit time.Duration) time.Duration {
	now := v.look(root, name)
	if v.since.IsZero() {
		v.since = now
		if last := v.sign(); !last.IsZero() {
			v.since = now.Add(-min(max(now.Sub(last), 0), credit))
		}
	}
	return now.Sub(v.since)
}

// sign is when the files say that the last sign of life was.
func (v *vigil) sign() time.Time { return later(v.state, v.lock) }

func (v *vigil) look(root, name string) time.Time {
	next := vigil{since: v.since}
	if st, err := os.Stat(filepath.Join(root, name, stateName)); err == nil {
		next.size, next.state = st.Size(), st.ModTime()
	}
	if st, err := os.Stat(lockPath(root, name)); err == nil {
		next.lock = st.ModTime()
	}
	now := time.Now()
	if !v.since.IsZero() && next != *v {
		next.since = now
	}
	*v = next
	return now
}

// beat is the holder's sign of life.
func (h *holding) beat() {
	now := time.Now()
	_ = os.Chtimes(h.lock.Path(), now, now) // without it others only fetch for themselves
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
