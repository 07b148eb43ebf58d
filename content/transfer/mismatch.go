package transfer

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// download fetches until the digest is right. After a mismatch each host gets one chance to serve the whole blob
// alone, those first that had no part in what was wrong: only the whole blob has a digest, so with several hosts
// nobody knows who lied.
func (j *job) download(ctx context.Context) error {
	err := j.attempt(ctx)
	if !errors.Is(err, errMismatch) {
		return err
	}
	tried := map[string]bool{}
	wrong := []error{err}
	for {
		name := j.nextAlone(tried)
		if name == "" {
			return j.reject(wrong)
		}
		tried[name] = true
		log.G(ctx).WithField("digest", j.blob.Digest).WithField("host", name).WithError(err).
			Warn("fetching the whole blob again from one host alone")
		if err := j.restart(name); err != nil {
			return err
		}
		if err = j.attempt(ctx); !errors.Is(err, errMismatch) && !errors.Is(err, errNoSource) {
			return err
		}
		wrong = append(wrong, err)
	}
}

// nextAlone chooses the host that is asked alone next; "" when all were.
func (j *job) nextAlone(tried map[string]bool) string {
	j.mu.Lock()
	defer j.mu.Unlock()
	choice := ""
	for _, s := range j.sources {
		if s.gone != nil || tried[s.host.name] {
			continue
		}
		if !s.host.served {
			return s.host.name
		}
		if choice == "" {
			choice = s.host.name
		}
	}
	if choice == "" {
		j.doomed = true
	}
	return choice
}

// reject drops the data: no host has the blob.
func (j *job) reject(wrong []error) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.generation++
	j.frontier = 0
	return errors.Join(j.folder.remove(), fmt.Errorf("no host has the right bytes, the data was dropped: %w: %w", errdefs.ErrDataLoss, oneLine(wrong)))
}

// restart throws away what was fetched and tells readers so.
func (j *job) restart(only string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	old := j.folder.data
	if err := errors.Join(j.folder.reset(), old.Close()); err != nil {
		return diskError(j.folder.path, err)
	}
	j.ledger = newLedger(j.blob.Size)
	j.frontier = 0
	j.generation++
	j.only = only
	for _, h := range j.hosts {
		h.served = false
	}
	j.touch()
	j.wake()
	return nil
}
