// Package snapshotter keeps container root file systems: containerd's
// snapshots.Snapshotter over layers that are mounted where they lie.
//
// A committed snapshot is one of two kinds. A tar layer is a hard link to the
// layer's uncompressed tar (`layer`) beside a small EROFS image of metadata
// (`index`), mounted once at mnt/<id> for all containers. A directory layer is
// a plain directory (`upper`): what a container wrote, or any layer on a host
// whose kernel cannot mount the first kind. Chains mix both. What containers
// write may be kept in a sparse file with a file system of its own
// (`upper.ext4`), which bounds it; a Commit keeps that file, as a directory layer
// that has to be mounted.
//
// Names, parents and labels are kept by containerd's core/snapshots/storage in
// metadata.db, of which metadata.db.saved is a copy that was found sound, at most
// seconds old (database.go). Everything else about a snapshot is read from its
// folder, so it survives a restart:
//
//	snapshots/<id>/upper, work  where a container or a differ writes
//	snapshots/<id>/upper.ext4   the same, in a file of Options.UpperSize
//	snapshots/<id>/upper.synced marks an upper.ext4 that reached the disk: without it, or damaged, it is lost
//	snapshots/<id>/layer        adopted: the tar (hard link)
//	snapshots/<id>/diffid       adopted: digest and size of the tar
//	snapshots/<id>/index        derived from the tar, with a checksum; never synced
//	snapshots/<id>/index.lowest the same, in case Commit names no parent
//	snapshots/<id>/onlylowest   why the layer cannot have a parent, until Commit
//	snapshots/<id>/pending      extracted before the parent was known (hard link to the tar)
//	snapshots/<id>/extracting   marks an extraction under way
//	snapshots/<id>/usage        blocks and inodes of a directory layer
//	snapshots/<id>/shifted      marks a directory that was written over id-mapped lowers
//	mnt/<id>                    where the tar layer is mounted
//	mnt/<id>.rw                 where upper.ext4 is mounted; upper and work are in it
//	empty                       the second lower of an overlay that needs two
//
// containerd's garbage collection waits behind Prepare, View, Commit and
// Remove, so these do one database transaction and, for a missing mount, one
// mount(2). Prepare with an upper file writes some 20 blocks and mounts it. What
// takes longer is done by Adopt, before Commit, or by a worker, after it.
//
// The mounts at mnt/<id> must be visible to containerd, so both run in the same
// mount namespace, or in two that share the propagation of root.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	digest "github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"

	"github.com/gantryd/gantry/snapshotter/layer"
)

// defaultKeepLayers is how long a layer file waits for its first snapshot.
const defaultKeepLayers = 10 * time.Minute

// databaseWait bounds the wait for the lock on metadata.db, which another
// gantryd on the same root would hold.
const databaseWait = 2 * time.Second

// Observer is told about snapshots.
type Observer interface {
	// Prepared is called once for each successful Prepare, with the namespace
	// of the request, the key and the labels. It must not block.
	Prepared(namespace, key string, labels map[string]string)
	// Adopted is called when a layer has become the content of a snapshot, with
	// how long that took: index and mount, or extraction. It is called once more
	// for a snapshot whose index depended on what its Commit said. It must not
	// block.
	Adopted(id string, diffID digest.Digest, took time.Duration)
	// SnapshotCommitted is called once for each successful Commit, with the
	// namespace of the request and the name. It must not block.
	SnapshotCommitted(namespace, name string)
}

// Expense is what a call spends time on that it only waits for.
type Expense int

const (
	// Syncing is the commit of a transaction, which syncs the database, and the
	// part of the wait for the transaction's turn that others' commits took.
	Syncing Expense = iota
	// Mounting is the wait for layers of the chain that are not mounted yet.
	Mounting
)

// Options of a Snapshotter. The zero value is ready to use.
type Options struct {
	// Mount is how layers become visible; empty means ModeAuto.
	Mount Mode
	// Upper is where new containers' changes are kept; empty means
	// UpperDirectory. Snapshots that are there stay as they are.
	Upper Upper
	// UpperSize is the size of an upper file in bytes, from MinUpperSize to
	// MaxUpperSize; zero means DefaultUpperSize. containerd's label
	// snapshots.LabelSnapshotMaxSize overrides it for one snapshot.
	UpperSize int64
	// Observer may be nil.
	Observer Observer
	// KeepLayers is how long Cleanup keeps a layer file that no snapshot links;
	// zero means 10 minutes.
	KeepLayers time.Duration
	// Spent, if not nil, is told what a call has waited for, with the call's
	// context. It must not block.
	Spent func(ctx context.Context, on Expense, took time.Duration)
}

// Snapshotter implements containerd's snapshots.Snapshotter and
// snapshots.Cleaner. Its methods may be called concurrently.
type Snapshotter struct {
	layout
	ms       *storage.MetaStore
	layers   *layer.Cache
	observer Observer
	spent    func(context.Context, Expense, time.Duration)
	syncing  syncClock
	keep     time.Duration
	mode     Mode
	reason   string
	overlay  []string
	unmapped error   // why lowers cannot be id-mapped; nil if they can
	uppers   *uppers // nil: directories

	tars    tarLayers
	locks   keyLocks
	work    *worker
	saver   *saver // nil where nothing is changed
	cleanMu chan struct{}

	closeOnce sync.Once
	closeErr  error
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// New opens the snapshotter in root, which it creates if needed. It removes what
// a crash has left (folders and mounts without a snapshot), and starts to
// mount all committed layers; it does not wait for them. The caller keeps
// layers open until Close has returned.
func New(ctx context.Context, root string, layers *layer.Cache, o Options) (_ *Snapshotter, retErr error) {
	root, err := prepareRoot(root)
	if err != nil {
		return nil, err
	}
	s := &Snapshotter{
		layout: layout{root: root}, layers: layers,
		observer: o.Observer, spent: o.Spent, keep: o.KeepLayers, cleanMu: make(chan struct{}, 1),
	}
	if s.spent == nil {
		s.spent = func(context.Context, Expense, time.Duration) {}
	}
	if s.keep == 0 {
		s.keep = defaultKeepLayers
	}
	// bbolt panics over some damage, and an empty database would make leftovers of all snapshots.
	if err := VerifyDatabase(root); errdefs.IsDataLoss(err) {
		return nil, fmt.Errorf("%w; run gantry check --repair", err)
	} else if err != nil {
		return nil, err
	}
	if s.ms, err = openStore(s.database(), false); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, s.ms.Close())
		}
	}()
	tree, err := s.loadTree(ctx)
	if err != nil {
		return nil, fmt.Errorf("open %s/metadata.db (does another gantryd use this root? if not, run gantry check): %w", root, err)
	}
	if s.mode, s.reason, err = chooseMode(ctx, root, o.Mount); err != nil {
		return nil, err
	}
	if s.uppers, err = chooseUpper(ctx, root, o.Upper, o.UpperSize); err != nil {
		return nil, err
	}
	if s.uppers == nil && onOverlayfs(root) {
		s.reason += "; containers cannot write to directories on overlayfs: set snapshotter.upper = \"file\", or root to another file system"
	}
	log.G(ctx).WithField("mode", s.mode).WithField("reason", s.reason).Info("snapshotter: how layers are mounted")
	s.overlay = overlayOptions(ctx, root)
	if s.unmapped = probeIDMapped(ctx, root, s.mode, s.overlay); s.unmapped != nil {
		log.G(ctx).WithError(s.unmapped).Info("snapshotter: no id-mapped mounts: user namespaces get copies of images")
	}
	if err := s.recover(ctx, tree); err != nil {
		return nil, err
	}
	s.work = newWorker(ctx)
	s.startSaver(ctx)
	s.resume(ctx, tree)
	return s, nil
}

// Inspect opens the snapshotter in root to look at it, without a change to what is there, which may be read-only. No
// gantryd may use the root, and the caller has verified its database. Of the result only Check, LayerFiles, Identify,
// Order and Close may be called. errdefs.ErrNotFound: there is no database, and no snapshots.
func Inspect(ctx context.Context, root string, layers *layer.Cache) (*Snapshotter, error) {
	root, err := resolveRoot(root)
	if err != nil {
		return nil, err
	}
	s := &Snapshotter{layout: layout{root: root}, layers: layers, cleanMu: make(chan struct{}, 1)}
	if fi, err := os.Stat(s.database()); err != nil || fi.Size() == 0 {
		return nil, fmt.Errorf("%s: %w", s.database(), errors.Join(err, errdefs.ErrNotFound))
	}
	if s.ms, err = openStore(s.database(), true); err != nil {
		return nil, err
	}
	s.work = newWorker(ctx)
	return s, nil
}

// openStore opens a database that the caller has verified.
func openStore(path string, readOnly bool) (*storage.MetaStore, error) {
	ms, err := storage.NewMetaStore(path, func(o *bolt.Options) error {
		o.Timeout = databaseWait
		o.ReadOnly = readOnly
		// The list of free pages is made again at start, which reads the whole of a small file, and not written with
		// each transaction: an eighth less time for one (median of 500 in turns, ext4).
		o.NoFreelistSync = true
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("snapshots in %s: %w", path, err)
	}
	return ms, nil
}

// prepareRoot creates the folders and resolves root.
func prepareRoot(root string) (string, error) {
	for _, d := range []string{"snapshots", "mnt", "empty"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o700); err != nil {
			return "", err
		}
	}
	return resolveRoot(root)
}

// resolveRoot returns root without symlinks, because mounts are compared by path.
func resolveRoot(root string) (string, error) {
	abs, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	if abs, err = filepath.EvalSymlinks(abs); err != nil {
		return "", err
	}
	// These characters separate or quote mount options.
	if i := strings.IndexAny(abs, ",:\\\"\n"); i >= 0 {
		return "", fmt.Errorf("snapshot root %q: overlay mount options cannot hold %q in a path: %w", abs, abs[i], errdefs.ErrInvalidArgument)
	}
	return abs, nil
}

// overlayOptions returns the options that every overlay mount gets.
func overlayOptions(ctx context.Context, root string) []string {
	var options []string
	user, err := overlayutils.NeedsUserXAttr(root)
	if err != nil {
		log.G(ctx).WithError(err).Warnf("snapshotter: cannot tell whether overlay needs userxattr, taking %v", user)
	}
	if user {
		options = append(options, "userxattr")
	}
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		// A lower layer is shared by many overlays, which an index forbids.
		options = append(options, "index=off")
	}
	return options
}

// Stat returns the info of the snapshot called key.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	if err != nil {
		return info, fmt.Errorf("snapshot %s: %w", key, err) // containerd's clients know it by another name
	}
	return info, nil
}

// Update changes the labels of a snapshot.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (updated snapshots.Info, err error) {
	err = s.update(ctx, func(ctx context.Context) error {
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	return updated, err
}

// Walk calls fn for each snapshot that matches the filters. No transaction is
// open then, so fn may be slow and may call the snapshotter.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	var infos []snapshots.Info
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return ignoreNotFound(storage.WalkInfo(ctx, func(_ context.Context, i snapshots.Info) error {
			infos = append(infos, i)
			return nil
		}, filters...))
	})
	if err != nil {
		return err
	}
	for _, i := range infos {
		if err := fn(ctx, i); err != nil {
			return err
		}
	}
	return nil
}

// Remove takes the snapshot out of the database. Its folder and mount go with
// the next Cleanup. A snapshot with children gives ErrFailedPrecondition.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	return s.update(ctx, func(ctx context.Context) error {
		if _, _, err := storage.Remove(ctx, key); err != nil {
			return fmt.Errorf("remove snapshot %s: %w", key, err)
		}
		return nil
	})
}

// Close stops the worker and closes the database. Mounts stay: containers run
// on. A second call does nothing.
func (s *Snapshotter) Close() error {
	s.closeOnce.Do(func() {
		s.work.stop()
		s.saver.stop()
		s.closeErr = s.ms.Close()
	})
	return s.closeErr
}

// ignoreNotFound drops the error that storage returns for a database without
// any snapshot yet.
func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
