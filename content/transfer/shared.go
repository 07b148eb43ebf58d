package transfer

import (
	"context"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// shared is what all transfers of a manager have in common.
type shared struct {
	hosts   *Hosts
	running chan struct{} // a slot for each running transfer

	dropPages func(f *os.File, off, n int64) // tests look
	makeRoom  func(rooms int64) bool         // the Manager's
	rooms     atomic.Int64                   // how often it made some

	mu    sync.Mutex
	liars map[string]time.Time // hosts that sent wrong bytes: for how long others are preferred
	done  map[string]stamp     // finished data files by path, verified in this process
}

// stamp recognises a data file that was verified before.
type stamp struct {
	info os.FileInfo
}

func (s stamp) matches(st os.FileInfo) bool {
	return s.info != nil && os.SameFile(s.info, st) && s.info.Size() == st.Size() && s.info.ModTime().Equal(st.ModTime())
}

func (s *shared) enter(ctx context.Context) error {
	select {
	case s.running <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (s *shared) leave() { <-s.running }

func (s *shared) remember(path string, f *os.File) {
	st, err := f.Stat()
	if err != nil {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.done[path] = stamp{info: st}
}

func (s *shared) remembers(path string, f *os.File) bool {
	st, err := f.Stat()
	if err != nil {
		return false
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.done[path].matches(st)
}

func (s *shared) forget(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.done, path)
}
