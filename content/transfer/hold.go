package transfer

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"sync"
	"time"
)

const (
	// tendEvery is how often a holder gives a sign of life and looks whether somebody else was faster.
	tendEvery = time.Second
	// adoptWithin is how long whoever just finished a folder may take until others can lock it.
	adoptWithin = time.Second
)

// run brings the blob here. On return nobody writes the folder any more.
func (j *job) run(ctx context.Context) error {
	defer func() { j.digest = digester{} }()
	for {
		hold, err := j.seek(ctx)
		if err != nil {
			return err
		}
		if err := j.runLocked(ctx, hold); !errors.Is(err, errNeedsLock) {
			return err
		}
	}
}

// seek waits until there is a folder for this job to work in, or a finished one. There is no limit to that as long as
// somebody else makes progress.
func (j *job) seek(ctx context.Context) (hold *holding, err error) {
	defer func() {
		if err = errors.Join(err, j.leaveTail()); err != nil && hold != nil {
			err = errors.Join(err, hold.lock.Close())
		}
	}()
	for {
		hold, name, err := j.survey()
		if err == nil && hold == nil && name != "" {
			hold, err = j.follow(ctx, name)
		}
		if hold != nil || err != nil {
			return hold, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}

// runLocked works and gives the lock back; after success a shared lock stays until the job is retired.
func (j *job) runLocked(ctx context.Context, hold *holding) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, hold.lock.Close())
		}
	}()
	j.setPhase(PhaseWaiting)
	for {
		err := j.tend(ctx, hold)
		if err == nil {
			break
		}
		if !errors.Is(err, errElsewhere) {
			return err
		}
		other, err := j.moveElsewhere(ctx, hold)
		if err != nil {
			return err
		}
		if other != nil {
			hold = other
			break
		}
	}
	// Shared from now on, so that others may use the blob and nobody removes it. The kernel gives the lock up for a
	// moment; should another process get in between, it finds a finished blob and does not write either.
	if _, err := hold.lock.TryRLock(); err != nil {
		return fmt.Errorf("lock of %s: %w", hold.name, err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.hold = hold
	return nil
}

// tend works, and meanwhile gives signs of life to those who wait and looks whether somebody else was faster.
func (j *job) tend(ctx context.Context, hold *holding) error {
	if hold.shared {
		return j.inTurn(ctx, hold)
	}
	if !j.places.complete(hold.name) && j.places.finished(hold.name) != "" {
		return errElsewhere
	}
	ctx, stop := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		if j.outrun(ctx, hold) {
			stop(errElsewhere)
		}
	})
	err := j.inTurn(ctx, hold)
	stop(nil)
	wg.Wait()
	if err != nil && errors.Is(context.Cause(ctx), errElsewhere) {
		return errElsewhere
	}
	return err
}

// outrun returns true when the blob was finished in another folder, and false when ctx ends. A holder that was
// stopped finds out so before it fetches on.
func (j *job) outrun(ctx context.Context, hold *holding) bool {
	var seen int64
	for every := min(tendEvery, max(j.opts.GiveUp/8, time.Millisecond)); ; {
		if now := j.progress.Load(); now != seen || j.busy() {
			seen = now
			hold.beat()
		}
		if sleep(ctx, every) != nil {
			return false
		}
		if j.places.finished(hold.name) != "" {
			return true
		}
	}
}

// busy reports whether the job has nobody to wait for but itself and its siblings.
func (j *job) busy() bool {
	if j.queueing() {
		return true
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.inLine || j.phase == PhaseVerifying
}

// inTurn works when the transfers before it have ended.
func (j *job) inTurn(ctx context.Context, hold *holding) error {
	j.setInLine(true)
	err := j.shared.enter(ctx)
	j.setInLine(false)
	if err != nil {
		return err
	}
	defer j.shared.leave()
	return j.work(ctx, hold)
}

func (j *job) setInLine(yes bool) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.inLine = yes
}

// work does everything that needs the lock.
func (j *job) work(ctx context.Context, hold *holding) error {
	path := folderPath(j.root, hold.name)
	f, err := openFolder(path, j.blob, hold.shared)
	if errors.Is(err, errNeedsLock) {
		j.places.refuse(hold.name, refusal)
	}
	if err != nil {
		return diskError(path, err)
	}
	if !f.sealed {
		err = j.goOn(ctx, f)
	} else if done, bad := j.adopt(ctx, hold, f); done || bad != nil {
		return bad
	} else if err = j.switchTo(f, false); err == nil {
		j.logger(ctx, hold.name).Warn("the finished transfer does not match its digest: fetching again")
		err = j.restart("")
	}
	if err != nil {
		return err
	}
	err = j.download(ctx)
	if err == nil {
		j.shared.remember(path, f.data)
		return nil
	}
	return errors.Join(err, j.suspend())
}

// adopt makes a finished file the job's own if its digest is right; nobody is asked for a byte. If it is wrong, the
// file stays open for whoever holds the lock exclusively; otherwise it is closed and the error is errNeedsLock.
func (j *job) adopt(ctx context.Context, hold *holding, f *folder) (done bool, err error) {
	ok, same, err := false, false, error(nil)
	if !j.places.isRefused(hold.name) {
		ok, same, err = j.check(ctx, f)
	}
	if err == nil && !ok {
		j.places.refuse(hold.name, 0)
		if hold.shared {
			err = errNeedsLock
		}
	}
	if err != nil {
		return false, errors.Join(err, f.data.Close())
	}
	if !ok {
		return false, nil
	}
	if err := j.switchTo(f, same); err != nil {
		return true, err
	}
	j.shared.remember(f.path, f.data)
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ledger = newLedger(0)
	j.frontier, j.verified = j.blob.Size, true
	j.lastByte = time.Now()
	j.wake()
	return true, nil
}

// check compares a finished file with the digest, and with what readers had so far. What was hashed while the file was
// followed is not read again.
func (j *job) check(ctx context.Context, f *folder) (ok, same bool, err error) {
	j.mu.Lock()
	old, shown := j.folder, j.frontier
	j.mu.Unlock()
	fresh := old == nil || shown == 0
	if ok = j.shared.remembers(f.path, f.data); !ok {
		j.setPhase(PhaseVerifying)
		if !fresh && sameData(old, f) {
			d := j.digester()
			if err := j.hashUpTo(ctx, d, f, j.blob.Size); err != nil {
				return false, false, err
			}
			if d.matches(j.blob) {
				return true, true, nil
			}
		}
		if ok, err = hashesTo(ctx, f.data, j.blob); !ok || err != nil {
			return false, false, err
		}
		if !fresh && sameData(old, f) {
			return true, false, nil // right now, but not when it was followed
		}
	}
	if fresh {
		return true, true, nil
	}
	same, err = samePrefix(ctx, old, f, shown)
	return true, same, err
}

// moveElsewhere adopts the blob from a folder in which somebody else finished it, and drops what lies in the own one.
// Without a result the blob there is not to be had.
func (j *job) moveElsewhere(ctx context.Context, own *holding) (*holding, error) {
	name := j.places.finished(own.name)
	if name == "" {
		return nil, nil
	}
	other, err := j.share(ctx, name)
	if other == nil || err != nil {
		j.places.refuse(name, refusal)
		return nil, err
	}
	f, err := openFolder(folderPath(j.root, name), j.blob, true)
	if err == nil {
		_, err = j.adopt(ctx, other, f)
	}
	if errors.Is(err, errNeedsLock) {
		j.places.refuse(name, refusal)
		return nil, other.lock.Close()
	}
	if err != nil {
		return nil, errors.Join(err, other.lock.Close())
	}
	j.logger(ctx, name).Info("another process completed the blob: taking it from there")
	if err := own.drop(folderPath(j.root, own.name)); err != nil {
		j.logger(ctx, own.name).WithError(err).Warn("the blob is there, but what was fetched here could not be removed")
	}
	return other, nil
}

// share waits a moment for whoever finished a folder to let others in.
func (j *job) share(ctx context.Context, name string) (*holding, error) {
	for until := time.Now().Add(adoptWithin); ; {
		h, err := tryShared(j.root, name)
		if h != nil || err != nil || time.Now().After(until) {
			return h, err
		}
		if err := sleep(ctx, lockPollMin); err != nil {
			return nil, err
		}
	}
}

// goOn takes over an unfinished folder: readers keep what they have seen of it or, in another folder, get a copy of it.
func (j *job) goOn(ctx context.Context, f *folder) error {
	j.mu.Lock()
	old, shown := j.folder, j.frontier
	j.mu.Unlock()
	keep := true
	switch {
	case old == nil || shown == 0 || sameAs(old, f):
	case old.path == f.path:
		keep = false // its holder found the bytes wrong before it ended
	default:
		n, err := f.inherit(ctx, old, shown)
		if err != nil {
			return errors.Join(diskError(f.path, err), f.abandonCopy(), f.data.Close())
		}
		keep = n == shown
		j.logger(ctx, filepath.Base(f.path)).Warnf("whoever fetches the blob in %s made no progress for %s: going on with a copy, from %d of %d bytes",
			old.path, j.opts.GiveUp, n, j.blob.Size)
	}
	return j.switchTo(f, keep)
}
