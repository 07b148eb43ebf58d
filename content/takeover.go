package content

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// settle is the work of the one STAT that may wait.
func (s *Session) settle(ctx context.Context) error {
	if s.ing.staged != "" {
		return nil
	}
	if err := s.prepared(ctx); err != nil {
		s.store.resign(s.ing, err)
		return err
	}
	s.store.busy(s.ing, false)
	s.shift = s.ing.offset - s.base
	return nil
}

func (s *Session) prepared(ctx context.Context) error {
	if s.eligible() {
		if err := s.takeOver(ctx); err != nil {
			return err
		}
	}
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	return s.finish(ctx)
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

// takeOver waits for a transfer to bring the blob, or for another client. Only the
// end of ctx, an Abort and a failure of the own disk are errors: after anything
// else the client goes on by itself, from what is there.
func (s *Session) takeOver(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	if err := s.store.watch(s.ing, cancel); err != nil {
		return err
	}
	defer s.store.unwatch(s.ing)

	if s.store.led(s.key()) {
		return s.share(ctx, nil, nil) // no transfer of what a client fetches already
	}
	_, ref := splitRef(s.ing.ref)
	req := FetchRequest{Namespace: s.namespace, Ref: ref, Digest: s.named, Size: s.declared}
	t, err := s.store.fetcher.Fetch(ctx, req)
	if err != nil {
		if err := s.mayGoOn(ctx, err); err != nil {
			return err
		}
		return s.share(ctx, nil, err)
	}
	err = s.await(ctx, t)
	if cerr := t.Close(); cerr != nil {
		log.G(ctx).WithError(cerr).WithField("digest", s.named).Warn("leaving a transfer")
	}
	return err
}

func (s *Session) await(ctx context.Context, t Transfer) error {
	s.store.waiting(s.ing, t)
	err := t.Wait(ctx)
	if err == nil {
		err = s.claim(t)
	}
	if err == nil {
		return nil
	}
	if err := s.mayGoOn(ctx, err); err != nil {
		return err
	}
	return s.share(ctx, t, err)
}

// mayGoOn returns nil if the client can fetch by itself although err happened.
func (s *Session) mayGoOn(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if errors.Is(err, ErrRefused) {
		return err
	}
	return nil
}

// claim makes the finished transfer's file the staged blob of this ingest, or its
// record where the transfer has given up the bytes.
func (s *Session) claim(t Transfer) error {
	if d, ok := t.(Discarding); ok && d.Record() != nil {
		return s.claimRecord(d.Record())
	}
	if err := s.folder(); err != nil {
		return err
	}
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
		err = s.store.place(s.ing, s.named, path, s.declared, false)
	}
	if err != nil {
		return errors.Join(err, removeFile(path))
	}
	return s.claimed()
}

func (s *Session) claimRecord(r *Record) error {
	if r.Digest != s.named || r.Size != s.declared {
		return fmt.Errorf("the transfer of %s left a record of %s with %d bytes: %w", s.named, r.Digest, r.Size, errdefs.ErrDataLoss)
	}
	if err := s.store.algorithmFolder(filepath.Dir(s.store.recordPath(s.named))); err != nil {
		return err
	}
	path, err := s.store.stageRecord(r)
	if err != nil {
		return err
	}
	if err := s.store.place(s.ing, s.named, path, s.declared, true); err != nil {
		return errors.Join(err, removeFile(path))
	}
	return s.claimed()
}

func (s *Session) claimed() error {
	if err := s.adopted(); err != nil {
		return err
	}
	s.store.brought(s.ing, s.key())
	return nil
}

// source has bytes of a blob that may be its first ones: a transfer or a lead.
type source interface {
	Frontier() int64
	CloneTo(ctx context.Context, f *os.File, off int64) (int64, error)
}

// salvage takes what a source has and the ingest has not, so that the client asks
// the registry for the rest only.
func (s *Session) salvage(ctx context.Context, from source) error {
	if s.ing.staged != "" || s.ing.alone || from.Frontier() <= s.ing.offset {
		return nil
	}
	f, err := s.data()
	if err != nil {
		return err
	}
	off := s.ing.offset
	n, err := from.CloneTo(ctx, f, off)
	if err == nil && off+n > s.ing.total {
		n, err = 0, fmt.Errorf("%d bytes of %s are more than its size of %d: %w", off+n, s.named, s.ing.total, errdefs.ErrDataLoss)
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
	if err := s.mayGoOn(ctx, err); err != nil {
		return err
	}
	s.tell(ctx, "not all of what a failed fetch left can be used, the client goes on", err)
	return nil
}
