package content

import (
	"context"
	"fmt"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

var (
	_ ccontent.Writer = (*writer)(nil)
	_ ccontent.Syncer = (*writer)(nil)
)

// Writer opens a session for a caller in this process. It has no takeover:
// containerd's interface has no call that may wait. Offsets are absolute.
func (s *Store) Writer(ctx context.Context, opts ...ccontent.WriterOpt) (ccontent.Writer, error) {
	var o ccontent.WriterOpts
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	sess, err := s.Open(ctx, o.Ref, o.Desc.Size, o.Desc.Digest)
	if err != nil {
		return nil, err
	}
	return &writer{sess}, nil
}

type writer struct{ session *Session }

func (w *writer) Status() (Status, error) {
	w.session.mu.Lock()
	defer w.session.mu.Unlock()
	if err := w.session.usable(); err != nil {
		return Status{}, err
	}
	return w.session.Stat(), nil
}

// Digest of the bytes so far, which are read again if a restart interrupted
// their writing.
func (w *writer) Digest() digest.Digest {
	s := w.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		if err := s.catchUp(context.Background()); err != nil {
			return ""
		}
	}
	return s.digest()
}

func (w *writer) Write(p []byte) (int, error) {
	s := w.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return 0, err
	}
	s.asked = true
	n, err := s.write(context.Background(), p) // io.Writer has no context
	return n, s.reason(err)
}

// Truncate starts over; nothing but 0 and the present offset is supported.
func (w *writer) Truncate(size int64) error {
	s := w.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.usable(); err != nil {
		return err
	}
	switch size {
	case s.ing.offset:
		return nil
	case 0:
		return s.reason(s.startOver())
	}
	return fmt.Errorf("truncate ref %q to %d: only 0 is supported: %w", s.ing.ref, size, errdefs.ErrInvalidArgument)
}

func (w *writer) Commit(ctx context.Context, size int64, expected digest.Digest, opts ...ccontent.Opt) error {
	var base ccontent.Info
	for _, opt := range opts {
		if err := opt(&base); err != nil {
			return err
		}
	}
	_, err := w.session.commit(ctx, size, expected, base.Labels, func() error { return nil })
	return err
}

// Sync makes what was written durable, which keeps Commit short.
func (w *writer) Sync() error {
	w.session.mu.Lock()
	defer w.session.mu.Unlock()
	return w.session.reason(w.session.sync())
}

func (w *writer) Close() error { return w.session.Close() }
