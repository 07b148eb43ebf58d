package snapshotter

import (
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// Mend repairs a flaw for which no layer file is needed, and says what it did. errdefs.ErrNotImplemented: it needs
// [Snapshotter.Renew]. It never removes what a container has written.
func (s *Snapshotter) Mend(ctx context.Context, f Flaw) (string, error) {
	if f.ID == "" {
		return s.mendStray(ctx, f)
	}
	switch f.Part {
	case PartIndex, PartMount:
		return s.remake(ctx, f)
	case PartLeftover, PartUsage:
		return s.tidyUp(ctx, f)
	case PartFolder:
		if f.Kind == snapshots.KindActive || f.Kind == snapshots.KindView {
			return s.remakeFolders(ctx, f)
		}
	case PartLayer:
		if path, err := s.layers.Path(f.DiffID); err == nil && path == f.Path {
			return "the file has its name again", s.layers.Give(f.DiffID, s.layer(f.ID)) // the caller has verified it
		}
	case PartRecord, PartLoop, PartUpper:
	}
	return "", fmt.Errorf("%s: %w", f.Path, errdefs.ErrNotImplemented)
}

// entry returns the snapshot as the database has it now, with its lock held.
func (s *Snapshotter) entry(ctx context.Context, id string) (h held, unlock func(), err error) {
	if unlock, err = s.locks.lock(ctx, id); err != nil {
		return h, nil, err
	}
	all, err := s.loadHeld(ctx)
	h, ok := all[id]
	if err == nil && !ok {
		err = fmt.Errorf("snapshot %s was removed meanwhile: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		unlock()
		return h, nil, err
	}
	return h, unlock, nil
}

func (s *Snapshotter) mendStray(ctx context.Context, f Flaw) (string, error) {
	if f.Part != PartLoop {
		if err := s.Cleanup(ctx); err != nil {
			return "", err
		}
		if exists(f.Path) {
			return "", fmt.Errorf("%s is still there: %w", f.Path, errdefs.ErrUnavailable)
		}
		return "removed", nil
	}
	dev, err := os.Open(f.Path)
	if err != nil {
		return "", err
	}
	defer dev.Close()
	// Its number may be of somebody else's file by now.
	if !slices.ContainsFunc(idleLoops(s.root), func(l idleLoop) bool { return l.device == f.Path }) {
		return "", fmt.Errorf("%s is used for something else now: %w", f.Path, errdefs.ErrFailedPrecondition)
	}
	return "detached", unix.IoctlSetInt(int(dev.Fd()), unix.LOOP_CLR_FD, 0)
}

// remake writes the index again and mounts the layer over what is mounted: containers that run keep what they have.
func (s *Snapshotter) remake(ctx context.Context, f Flaw) (string, error) {
	h, unlock, err := s.entry(ctx, f.ID)
	if err != nil {
		return "", err
	}
	defer unlock()
	if !s.isTar(f.ID) {
		return "unmounted", s.unmount(f.ID) // a directory has no mount
	}
	if f.Path == s.lowestIndex(f.ID) {
		return "removed; it is made again when it is needed", removeFile(f.Path)
	}
	if err := removeIf(f.Part == PartIndex, s.index(f.ID)); err != nil {
		return "", err
	}
	return "made again from the layer file", s.remount(ctx, f.ID, h)
}

func removeIf(yes bool, path string) error {
	if !yes {
		return nil
	}
	return removeFile(path)
}

// remount mounts a committed tar layer anew, index included, if it was mounted: on top of what is there, because an
// empty mount point would show as an empty layer. The older mount goes with the snapshot. The caller has its lock.
func (s *Snapshotter) remount(ctx context.Context, id string, h held) error {
	if h.Kind != snapshots.KindCommitted || s.mode == "" {
		return nil // Commit or the next start does it
	}
	if s.mode == ModeDirectory {
		return s.extractCommitted(ctx, id, h.parents)
	}
	if err := s.ensureIndex(ctx, id, h.parents); err != nil {
		return err
	}
	if err := s.mountLayer(ctx, id); err != nil {
		return err
	}
	return s.tidy(ctx, id)
}

func (s *Snapshotter) tidyUp(ctx context.Context, f Flaw) (string, error) {
	h, unlock, err := s.entry(ctx, f.ID)
	if err != nil {
		return "", err
	}
	defer unlock()
	switch {
	case f.Part == PartUsage:
		return "removed; it is measured again when it is asked for", removeFile(f.Path)
	case f.Path == s.extracting(f.ID):
		return "undone", s.rollBack(f.ID, h.Kind)
	}
	return "removed", s.removeTemporary(f.ID)
}

// remakeFolders gives a container empty folders for those that are gone.
func (s *Snapshotter) remakeFolders(ctx context.Context, f Flaw) (string, error) {
	h, unlock, err := s.entry(ctx, f.ID)
	if err != nil {
		return "", err
	}
	defer unlock()
	const did = "made again, empty: what the container had written there is lost"
	ids, err := s.mapping(ctx, h.Info, h.parents)
	if err != nil {
		return "", err
	}
	if !exists(s.dir(f.ID)) {
		snap := storage.Snapshot{ID: f.ID, Kind: h.Kind, ParentIDs: h.parents}
		if err := s.makeFolder(snap); err != nil || s.fileSize(ctx, h.Info) > 0 {
			return did, err
		}
	}
	if !exists(s.upper(f.ID)) {
		if err := errors.Join(s.makeUpper(f.ID), s.chownUpper(ctx, f.ID, h.parents, ids)); err != nil {
			return "", err
		}
	}
	if h.Kind == snapshots.KindActive {
		if err := os.Mkdir(s.workdir(f.ID), 0o711); err != nil && !errors.Is(err, iofs.ErrExist) {
			return "", err
		}
	}
	return did, nil
}

// Identify finds the DiffID of a committed snapshot's layer among candidates, by its name: containerd names it by the
// chain ID, a hash over the parent's and the DiffID, so nobody need be trusted. "" if it is none of them.
func (s *Snapshotter) Identify(ctx context.Context, id string, candidates []digest.Digest) (digest.Digest, error) {
	all, err := s.loadHeld(ctx)
	if err != nil {
		return "", err
	}
	h := all[id]
	prefix := ""
	if len(h.parents) > 0 {
		prefix = chainID(all[h.parents[0]].key) + " "
	}
	want := chainID(h.key)
	i := slices.IndexFunc(candidates, func(d digest.Digest) bool {
		return prefix == "" && d.String() == want || prefix != "" && digest.FromString(prefix+d.String()).String() == want
	})
	if i < 0 {
		return "", nil
	}
	return candidates[i], nil
}

// chainID is the last part of "number/namespace/name".
func chainID(key string) string {
	parts := strings.SplitN(key, "/", 3)
	return parts[len(parts)-1]
}

// Renew makes the layer file of diffID, which the cache has and the caller has verified, the content of a committed
// snapshot that lost its own or has a broken one: link, record, index and mount. Mounts that containers have stay.
func (s *Snapshotter) Renew(ctx context.Context, id string, diffID digest.Digest) error {
	unpin := s.layers.Pin(diffID)
	defer unpin()
	l, err := s.layers.Get(ctx, diffID)
	if err != nil {
		return err
	}
	h, unlock, err := s.entry(ctx, id)
	if err != nil {
		return err
	}
	defer unlock()
	if h.Kind != snapshots.KindCommitted {
		return fmt.Errorf("snapshot %s is %s: %w", h.key, h.Kind, errdefs.ErrFailedPrecondition)
	}
	if err := os.MkdirAll(s.dir(id), 0o700); err != nil {
		return err
	}
	if err := s.writeRecord(id, adopted{l.DiffID, l.Size}); err != nil {
		return err
	}
	if err := s.relink(id, diffID); err != nil {
		return err
	}
	if err := syncDir(s.dir(id), s.snapshotsDir()); err != nil {
		return err
	}
	// What is derived from the file may be of the broken one.
	if err := errors.Join(removeFile(s.index(id)), removeFile(s.lowestIndex(id))); err != nil {
		return err
	}
	return s.remount(ctx, id, h)
}

// relink replaces the link in one step.
func (s *Snapshotter) relink(id string, diffID digest.Digest) error {
	tmp := s.layer(id) + ".tmp"
	if err := removeFile(tmp); err != nil {
		return err
	}
	if err := s.layers.Link(diffID, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.layer(id)); err != nil {
		return err
	}
	return removeFile(tmp) // where both were one file the rename did nothing
}

// Order sorts ids so that parents come before their children.
func (s *Snapshotter) Order(ctx context.Context, ids []string) ([]string, error) {
	all, err := s.loadHeld(ctx)
	if err != nil {
		return nil, err
	}
	sorted := slices.Clone(ids)
	slices.SortStableFunc(sorted, func(a, b string) int { return len(all[a].parents) - len(all[b].parents) })
	return sorted, nil
}
