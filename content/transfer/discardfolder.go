package transfer

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/gofrs/flock"
)

const (
	// discardRoot is the folder of jobs that discard, below the root: discarding/<process>/<job>/, laid out as the root is.
	// Nobody else follows or resumes what lies there, for it has holes. Each process holds a lock of its own, and what
	// lies there without a process is of no use to anybody.
	discardRoot = "discarding"
	discardLock = "discarding-" // and the process's name, in locks/
	nameTries   = 1000
)

// discardFolders are the folders of this process's discarding jobs.
type discardFolders struct {
	root string

	mu   sync.Mutex
	lock *flock.Flock // nil until the first job
	name string
	jobs int
}

// folder makes one for a job. The job removes it when it ends.
func (p *discardFolders) folder() (string, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lock == nil {
		if err := p.claim(); err != nil {
			return "", fmt.Errorf("folders of transfers that are not kept: %w", err)
		}
	}
	p.jobs++
	dir := filepath.Join(p.path(p.name), strconv.Itoa(p.jobs))
	return dir, os.MkdirAll(filepath.Join(dir, locksName), 0o700)
}

// claim finds a name. It is locked before the folder is made, so that nobody takes the folder for a leftover.
func (p *discardFolders) claim() error {
	for n := range nameTries {
		name := strconv.Itoa(os.Getpid()) + "." + strconv.Itoa(n)
		l, err := tryLock(p.root, discardLock+name, false)
		if err != nil {
			return err
		}
		if l == nil {
			continue
		}
		if err := errors.Join(os.RemoveAll(p.path(name)), os.MkdirAll(p.path(name), 0o700)); err != nil {
			return errors.Join(err, l.Close())
		}
		p.lock, p.name = l, name
		return nil
	}
	return fmt.Errorf("no name is free in %s: %w", p.path(""), errdefs.ErrUnavailable)
}

func (p *discardFolders) path(name string) string { return filepath.Join(p.root, discardRoot, name) }

// close removes what is left; open files stay readable.
func (p *discardFolders) close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.lock == nil {
		return nil
	}
	l := p.lock
	p.lock = nil
	return errors.Join(os.RemoveAll(p.path(p.name)), notMissing(os.Remove(l.Path())), l.Close())
}

// sweep removes what processes left that are no more.
func (p *discardFolders) sweep() error {
	var errs []error
	locks, err := os.ReadDir(filepath.Join(p.root, locksName))
	errs = append(errs, notMissing(err))
	folders, err := os.ReadDir(p.path(""))
	errs = append(errs, notMissing(err))
	names := map[string]bool{}
	for _, e := range locks {
		if name, ok := strings.CutPrefix(e.Name(), discardLock); ok {
			names[name] = true
		}
	}
	for _, e := range folders {
		names[e.Name()] = true
	}
	for name := range names {
		l, err := tryLock(p.root, discardLock+name, false)
		if l != nil {
			err = errors.Join(os.RemoveAll(p.path(name)), notMissing(os.Remove(l.Path())), l.Close())
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// JoinDiscarding is Join for whoever does not want to keep the bytes: as the readers tell with Handle.Discard how far they
// are, the bytes behind them are given up. A transfer that runs already stays what it is, and a blob of which something
// lies on disk is kept: so is what another process fetches. Join gets no transfer of which something was given up, but a
// new one; JoinDiscarding does, to wait for it together with others.
func (m *Manager) JoinDiscarding(ctx context.Context, image string, b Blob, sources ...Source) (*Handle, error) {
	return m.join(ctx, image, b, true, sources)
}

// makeJob makes the job of a blob. discard: in a folder apart, if there is nothing to go on with.
func (m *Manager) makeJob(ctx context.Context, b Blob, discard bool) *job {
	if !discard || b.Size == 0 || m.present(b) {
		return newJob(m.root, b, m.opts, m.shared)
	}
	root, err := m.apart.folder()
	if err != nil {
		log.G(ctx).WithField("digest", b.Digest).WithError(err).Warn("the compressed bytes are kept")
		return newJob(m.root, b, m.opts, m.shared)
	}
	j := newJob(root, b, m.opts, m.shared)
	j.discard = newDiscarding()
	ctx, j.discard.stop = context.WithCancel(ctx)
	m.wg.Go(func() { j.discardAll(ctx) })
	return j
}

// present reports whether a folder of the blob is there, whoever works in it.
func (m *Manager) present(b Blob) bool {
	for _, name := range newPlaces(m.root, b).names() {
		if _, err := os.Lstat(folderPath(m.root, name)); !errors.Is(err, fs.ErrNotExist) {
			return true
		}
	}
	return false
}

// removeApart removes the folder of a discarding job that has ended.
func (j *job) removeApart() error {
	if j.discard == nil {
		return nil
	}
	j.stopDiscarding()
	return os.RemoveAll(j.root)
}
