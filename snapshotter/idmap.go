package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ErrIDMapped is returned for a snapshot that is to be seen through id-mapped
// mounts on a host where these do not work. Clients send such a request only if
// containerd's configuration declares the capability remap-ids for gantry.
var ErrIDMapped = fmt.Errorf("id-mapped mounts do not work on this host: remove the capability remap-ids from gantry's proxy plugin in containerd's configuration (gantry config containerd prints it as it has to be): %w", errdefs.ErrNotImplemented)

// idMap is how a user namespace sees a snapshot: lists of
// container-id:host-id:size, as containerd's labels and mount options write
// them (core/mount).
type idMap struct {
	uid, gid string
	// Root of the namespace, as the host knows it.
	rootUID, rootGID int
	// Whether the lowers have the owners of the image and are to be mapped.
	lowers bool
}

// options are what containerd's mount package maps the lowers of an overlay by.
// The upper is not mapped: what is written there has the ids of the host.
func (m *idMap) options() []string {
	if m == nil || !m.lowers {
		return nil
	}
	return []string{"uidmap=" + m.uid, "gidmap=" + m.gid}
}

// parseIDMap returns nil for a snapshot without the labels. Like the snapshotter
// of overlayfs it wants an id for the namespace's root.
func parseIDMap(labels map[string]string) (*idMap, error) {
	uid, isUID := labels[snapshots.LabelSnapshotUIDMapping]
	gid, isGID := labels[snapshots.LabelSnapshotGIDMapping]
	if !isUID && !isGID {
		return nil, nil
	}
	m := &idMap{uid: uid, gid: gid}
	var err error
	if m.rootUID, err = rootOf(uid); err != nil {
		return nil, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotUIDMapping, err)
	}
	if m.rootGID, err = rootOf(gid); err != nil {
		return nil, fmt.Errorf("label %s: %w", snapshots.LabelSnapshotGIDMapping, err)
	}
	return m, nil
}

// rootOf checks a list of mappings, which becomes a mount option, and returns
// what it makes of id 0.
func rootOf(list string) (int, error) {
	root := -1
	for mapping := range strings.SplitSeq(list, ",") {
		var ids [3]int64
		parts := strings.Split(mapping, ":")
		if len(parts) != len(ids) {
			return 0, fmt.Errorf("%.100q is not container-id:host-id:size: %w", mapping, errdefs.ErrInvalidArgument)
		}
		for i, part := range parts {
			n, err := strconv.ParseUint(part, 10, 32)
			if err != nil {
				return 0, fmt.Errorf("%.100q is not container-id:host-id:size: %w", mapping, errdefs.ErrInvalidArgument)
			}
			ids[i] = int64(n)
		}
		// The last id stands for no id.
		if size := ids[2]; size == 0 || ids[0]+size > math.MaxUint32 || ids[1]+size > math.MaxUint32 {
			return 0, fmt.Errorf("%q maps no ids or too many: %w", mapping, errdefs.ErrInvalidArgument)
		}
		if ids[0] == 0 {
			root = int(ids[1])
		}
	}
	if root < 0 {
		return 0, fmt.Errorf("%.100q has no id for root: %w", list, errdefs.ErrInvalidArgument)
	}
	return root, nil
}

// mapping returns how a snapshot with these parents is to be seen; nil means as
// the host sees it. Layers are unpacked as the host sees them: an unpack's labels
// are an image's annotations, and its layers may be those of other images. Where a client was not told of remap-ids it
// makes a copy of the image with changed owners and asks for a snapshot on top
// of that, with the same labels: such a copy is not mapped twice.
func (s *Snapshotter) mapping(ctx context.Context, info snapshots.Info, parents []string) (*idMap, error) {
	if isUnpackKey(info.Name) {
		return nil, nil
	}
	m, err := parseIDMap(info.Labels)
	if m == nil || err != nil || len(parents) == 0 {
		return m, err
	}
	for i, id := range parents {
		if exists(s.shifted(id)) {
			return nil, fmt.Errorf("layer %d of %d was written in a user namespace, so its owners are not those of the layers below; make an image of it first: %w", len(parents)-i, len(parents), errdefs.ErrFailedPrecondition)
		}
	}
	copied, err := s.ownedBy(ctx, parents[0], m)
	if err != nil {
		return nil, fmt.Errorf("parent: %w", err)
	}
	if m.lowers = !copied; m.lowers && s.unmapped != nil {
		return nil, fmt.Errorf("%w (%w)", ErrIDMapped, s.unmapped)
	}
	return m, nil
}

// ownedBy says whether a directory layer belongs to the root of a namespace,
// which is not the host's.
func (s *Snapshotter) ownedBy(ctx context.Context, id string, m *idMap) (bool, error) {
	if s.isTar(id) || (m.rootUID == 0 && m.rootGID == 0) {
		return false, nil
	}
	uid, gid, err := s.layerOwner(ctx, id)
	return uid == m.rootUID && gid == m.rootGID && err == nil, err
}

// layerOwner is whose the root of a committed directory layer is.
func (s *Snapshotter) layerOwner(ctx context.Context, id string) (uid, gid int, err error) {
	if err := s.openCommitted(ctx, id); err != nil {
		return 0, 0, err
	}
	return owner(s.upper(id))
}

func owner(name string) (uid, gid int, err error) {
	fi, err := os.Lstat(name)
	if err != nil {
		return 0, 0, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, 0, fmt.Errorf("%s: owner unknown: %w", name, errdefs.ErrNotImplemented)
	}
	return int(st.Uid), int(st.Gid), nil
}

// ProbeIDMapped returns why a Snapshotter on the file system of dir would not
// map layers for user namespaces, nil if it would. dir is an empty folder and is
// left empty.
func ProbeIDMapped(ctx context.Context, dir string, want Mode) error {
	mode, _, err := chooseMode(ctx, dir, want)
	if err != nil {
		return err
	}
	return probeIDMapped(ctx, dir, mode, overlayOptions(ctx, dir))
}

// probeID is what the probe maps root to; any other id would do.
const probeID = 100000

// probeIDMapped returns why overlays over id-mapped lowers do not work in root,
// nil if they do: Linux 5.19 or later, a file system that allows it both for
// root and, unless layers are directories, for EROFS, and user namespaces that
// may be made. It does what containerd's mount package does.
func probeIDMapped(ctx context.Context, root string, mode Mode, overlay []string) (err error) {
	defer func() { err = errors.Join(err, removeProbe(root)) }()
	layer, err := makeProbe(ctx, root, mode)
	if err != nil {
		return err
	}
	ns, err := mount.GetUsernsFD(fmt.Sprintf("0:%d:1", probeID), fmt.Sprintf("0:%d:1", probeID))
	if err != nil {
		return fmt.Errorf("make a user namespace: %w", err)
	}
	defer ns.Close()
	path := func(name string) string { return filepath.Join(root, "probe", name) }
	for _, name := range []string{"mapped", "upper", "work", "merged"} {
		if err := os.Mkdir(path(name), 0o755); err != nil {
			return err
		}
	}
	if err := mount.IDMapMountWithAttrs(filepath.Dir(layer), path("mapped"), int(ns.Fd()), unix.MOUNT_ATTR_RDONLY, 0); err != nil {
		return err
	}
	options := append([]string{"lowerdir=" + path("mapped/0"), "upperdir=" + path("upper"), "workdir=" + path("work")}, overlay...)
	if err := unix.Mount("overlay", path("merged"), "overlay", 0, strings.Join(options, ",")); err != nil {
		return fmt.Errorf("overlay over id-mapped layers: %w", err)
	}
	file := path("merged/probe")
	if err := os.Chmod(file, 0o600); err != nil { // copies it up
		return fmt.Errorf("change a file of an id-mapped layer: %w", err)
	}
	for _, name := range []string{file, path("upper/probe")} {
		if uid, gid, err := owner(name); err != nil {
			return err
		} else if uid != probeID || gid != probeID {
			return fmt.Errorf("an id-mapped layer shows %d:%d as owner instead of %d:%d: %w", uid, gid, probeID, probeID, errdefs.ErrDataLoss)
		}
	}
	return nil
}
