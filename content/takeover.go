package content

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// settle is the work of the one STAT that may wait.
func (s *Session) settle(ctx context.Context) error {
	if s.ing.staged != "" {
		return nil
	}
	if s.eligible() {
		if err := s.takeOver(ctx); err != nil {
			return err
		}
	}
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	if err := s.finish(ctx); err != nil {
		return err
	}
	s.shift = s.ing.offset - s.base
	return nil
}

// finish stages an ingest that has all bytes but was not staged: a crash came in
// between, or they are not the blob. Those are of no use to anybody, and answering
// offset 0 lets the client fetch the right ones.
func (s *Session) finish(ctx context.Context) error {
	if s.ing.staged != "" || s.ing.total == 0 || s.ing.offset != s.ing.total {
		return nil
	}
	if err := s.complete(ctx); err != nil || s.ing.staged != "" {
		return err
	}
	return s.spoiled()
}

// spoiled empties an ingest that has all bytes of a blob but is not it. Bytes of
// a failed transfer may be why; they must not stand in the way of the next try.
func (s *Session) spoiled() error {
	if s.ing.salvaged {
		s.ing.alone = true
		if s.store.observer != nil {
			s.store.observer.Mismatched(s.namespace, s.named)
		}
	}
	return s.startOver()
}

// eligible: a transfer can only be asked for by digest and size, and brings
// nothing to an ingest that has its bytes.
func (s *Session) eligible() bool {
	return s.store.fetcher != nil && s.declared > 0 && s.named != "" && s.named == s.want && s.ing.offset < s.ing.total
}

// takeOver waits for a transfer to bring the blob. Only the end of ctx, an Abort
// and a failure of the own disk are errors: after anything else the client goes
// on by itself, from what is there.
func (s *Session) takeOver(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := s.store.watch(s.ing, cancel); err != nil {
		return err
	}
	defer s.store.waiting(s.ing, nil)

	_, ref := splitRef(s.ing.ref)
	req := FetchRequest{Namespace: s.namespace, Ref: ref, Digest: s.named, Size: s.declared}
	t, err := s.store.fetcher.Fetch(ctx, req)
	if err != nil {
		return s.alone(ctx, "no transfer, the client fetches", err)
	}
	s.store.waiting(s.ing, t)
	err = s.await(ctx, t)
	s.store.waiting(s.ing, nil)
	if cerr := t.Close(); cerr != nil {
		log.G(ctx).WithError(cerr).WithField("digest", s.named).Warn("leaving a transfer")
	}
	return err
}

func (s *Session) await(ctx context.Context, t Transfer) error {
	err := t.Wait(ctx)
	if err == nil {
		err = s.claim(t)
	}
	if err == nil {
		return nil
	}
	if err := s.alone(ctx, "the transfer failed, the client goes on", err); err != nil {
		return err
	}
	return s.salvage(ctx, t)
}

// alone decides whether the client can go on after err, and says why it has to.
func (s *Session) alone(ctx context.Context, what string, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, ErrRefused) {
		return err
	}
	entry := log.G(ctx).WithError(err).WithField("digest", s.named).WithField("ref", s.ing.ref)
	if errdefs.IsNotFound(err) {
		entry.Debug(what)
	} else {
		entry.Warn(what)
	}
	return nil
}

// claim makes the finished transfer's file the staged blob of this ingest.
func (s *Session) claim(t Transfer) error {
	path := s.ing.path(claimedFile)
	if err := removeFile(path); err != nil {
		return err
	}
	if err := t.LinkTo(path); err != nil {
		return err
	}
	fi, err := os.Stat(path)
	if err == nil && fi.Size() != s.declared {
		err = fmt.Errorf("the transfer of %s has %d bytes, not %d: %w", s.named, fi.Size(), s.declared, errdefs.ErrDataLoss)
	}
	if err == nil {
		err = s.store.place(s.ing, s.named, path, s.declared)
	}
	if err != nil {
		return errors.Join(err, removeFile(path))
	}
	if err := errors.Join(s.closeData(), removeFile(s.ing.path(dataFile))); err != nil {
		return err
	}
	s.ing.digester = nil
	s.ing.rehash(s.algorithm())
	return s.store.settleFolder(s.named)
}

// salvage takes what a failed transfer has and the ingest has not, so that the
// client asks the registry for the rest only.
func (s *Session) salvage(ctx context.Context, t Transfer) error {
	if s.ing.staged != "" || s.ing.alone || t.Frontier() <= s.ing.offset {
		return nil
	}
	f, err := s.data()
	if err != nil {
		return err
	}
	off := s.ing.offset
	n, err := t.CloneTo(ctx, f, off)
	if err == nil && off+n > s.ing.total {
		n, err = 0, fmt.Errorf("the transfer of %s has more than %d bytes: %w", s.named, s.ing.total, errdefs.ErrDataLoss)
	}
	if n > 0 {
		s.ing.salvaged = true
	}
	if err == nil {
		s.store.advance(s.ing, off+n)
		return nil
	}
	if terr := f.Truncate(off + n); terr != nil {
		return errors.Join(err, terr)
	}
	s.store.advance(s.ing, off+n)
	if full(err) {
		return err
	}
	return s.alone(ctx, "the transfer failed again, the client goes on", err)
}
