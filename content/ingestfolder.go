package content

import (
	"errors"
	"os"
	"strconv"

	"github.com/containerd/log"
)

// folder makes the ingest's folder as containerd's local store would, if it is not
// there yet. Open leaves that to whoever needs a file first.
func (s *Session) folder() error {
	if s.ing.made {
		return nil
	}
	s.store.cleared(s.ing.dir)
	if err := os.RemoveAll(s.ing.dir); err != nil {
		return err
	}
	if err := os.Mkdir(s.ing.dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(s.ing.path(refFile), []byte(s.ing.ref), 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(s.ing.path(dataFile), nil, 0o644); err != nil {
		return err
	}
	if s.ing.total > 0 {
		if err := s.writeTotal(); err != nil {
			return err
		}
	}
	st := s.Stat()
	if err := errors.Join(writeTime(s.ing.path(startedFile), st.StartedAt), writeTime(s.ing.path(updatedFile), st.UpdatedAt)); err != nil {
		return err
	}
	s.ing.made = true
	return nil
}

func (s *Session) writeTotal() error {
	return os.WriteFile(s.ing.path(totalFile), []byte(strconv.FormatInt(s.ing.total, 10)), 0o644)
}

// remove frees the ref of an ingest that holds no blob and nobody writes. Its folder goes in the background: containerd's
// database waits for COMMIT and its garbage collection for Abort, and removing a file waits for the file system's journal.
// What a crash leaves of it is an ingest again, which that collection aborts.
func (s *Store) remove(ing *ingest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.ingests, ing.ref)
	if !ing.made {
		return
	}
	done := make(chan struct{})
	s.clearing[ing.dir] = done
	s.freeing.Go(func() {
		if s.onClear != nil {
			s.onClear(ing.dir)
		}
		if err := os.RemoveAll(ing.dir); err != nil {
			log.L.WithError(err).WithField("ref", ing.ref).Warn("leftovers of an ingest that has ended")
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.clearing, ing.dir)
		close(done)
	})
}

// cleared returns when nobody removes dir any more.
func (s *Store) cleared(dir string) {
	s.mu.Lock()
	done := s.clearing[dir]
	s.mu.Unlock()
	if done != nil {
		<-done
	}
}
