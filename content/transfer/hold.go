package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/log"
)

// run brings the blob here. On return nobody writes the folder any more.
func (j *job) run(ctx context.Context) error {
	err := j.runLocked(ctx, false)
	if errors.Is(err, errNeedsLock) {
		err = j.runLocked(ctx, true)
	}
	return err
}

// runLocked takes the lock, works and gives the lock back; after success a shared lock stays until the job is retired.
func (j *job) runLocked(ctx context.Context, exclusive bool) (err error) {
	hold, err := lockFolder(ctx, j.root, j.blob, exclusive, j.opts.GiveUp, func(name string) {
		if j.currentPhase() != PhaseLock {
			log.G(ctx).WithField("digest", j.blob.Digest).Infof("another process fetches the blob: waiting for the lock of %s", name)
			j.setPhase(PhaseLock)
		}
	})
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, hold.lock.Close())
		}
	}()
	j.setPhase(PhaseWaiting)
	if err := j.shared.enter(ctx); err != nil {
		return err
	}
	defer j.shared.leave()
	if err := j.work(ctx, hold); err != nil {
		return err
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

func (j *job) currentPhase() Phase {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.phase
}

// work does everything that needs the lock.
func (j *job) work(ctx context.Context, hold *holding) error {
	path := folderPath(j.root, hold.name)
	f, err := openFolder(path, j.blob)
	if err != nil {
		return diskError(path, err)
	}
	j.mu.Lock()
	if j.folder != nil { // a second try under the exclusive lock
		err = j.folder.data.Close()
	}
	j.folder = f
	j.wake()
	j.mu.Unlock()
	if err != nil {
		return err
	}
	if f.sealed {
		ok, err := j.adopt(ctx, path)
		if ok || err != nil {
			return err
		}
		if hold.shared {
			return errNeedsLock
		}
		log.G(ctx).WithField("digest", j.blob.Digest).Warnf("finished transfer %s does not match its digest: fetching again", path)
		if err := j.restart(""); err != nil {
			return err
		}
	}
	err = j.download(ctx)
	if err == nil {
		j.shared.remember(path, f.data)
		return nil
	}
	return errors.Join(err, j.suspend())
}

// adopt checks a finished data file against the digest without asking anybody for a byte.
func (j *job) adopt(ctx context.Context, path string) (bool, error) {
	f := j.folder
	if !j.shared.remembers(path, f.data) {
		j.setPhase(PhaseVerifying)
		ok, err := hashesTo(ctx, f.data, j.blob)
		if !ok || err != nil {
			return false, err
		}
		j.shared.remember(path, f.data)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.ledger = newLedger(0)
	j.frontier, j.verified = j.blob.Size, true
	j.lastByte = time.Now()
	j.wake()
	return true, nil
}
