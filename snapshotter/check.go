package snapshotter

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	iofs "io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// What follows is for `gantry check`. It takes no lock of a snapshot, because Commit fails at once where one is held:
// what looks wrong is looked at once more, and counts if no job was about it and nothing had changed.

// Flaw is what Check found of one snapshot.
type Flaw struct {
	ID   string // "" for what belongs to no snapshot
	Key  string // its name, containerd's "namespace/number/name"
	Kind snapshots.Kind
	Part Part
	Path string
	// DiffID of its layer, if that is known.
	DiffID  digest.Digest
	Problem string
}

// Part is which part of a snapshot is broken.
type Part string

// The parts of a snapshot.
const (
	PartLayer    Part = "layer link"  // missing, of another size, or another file than the layer's
	PartRecord   Part = "record"      // of the layer's digest and size
	PartIndex    Part = "index"       // damaged
	PartUsage    Part = "usage"       // not two numbers
	PartFolder   Part = "folder"      // missing, or that of a container or a directory layer without upper or work
	PartMount    Part = "mount"       // shows something else, or belongs to nobody
	PartLeftover Part = "leftover"    // of a crash or of a removed snapshot
	PartLoop     Part = "loop device" // of a snapshot that is gone, with no user
	PartUpper    Part = "upper file"  // of a container or of its commit: gone, or damaged
)

// leftAfter is how old what looks like a leftover must be: a Cleanup or a worker may be about to remove it.
const leftAfter = 10 * time.Minute

// held is a snapshot of the database.
type held struct {
	node
	key string
}

func (s *Snapshotter) loadHeld(ctx context.Context) (map[string]held, error) {
	tree, err := s.loadTree(ctx)
	if err != nil {
		return nil, err
	}
	all := make(map[string]held, len(tree))
	err = s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		ids, err := storage.IDMap(ctx)
		for id, key := range ids {
			if n, ok := tree[id]; ok {
				all[id] = held{n, key}
			}
		}
		return ignoreNotFound(err)
	})
	return all, err
}

// Names lists the committed snapshots as "namespace/name", without the number that containerd puts in between.
func (s *Snapshotter) Names(ctx context.Context) (map[string]bool, error) {
	all, err := s.loadHeld(ctx)
	names := make(map[string]bool, len(all))
	for _, h := range all {
		if parts := strings.SplitN(h.key, "/", 3); len(parts) == 3 && h.Kind == snapshots.KindCommitted {
			names[parts[0]+"/"+parts[2]] = true
		}
	}
	return names, err
}

// busy says whether somebody is about to change the snapshot's folder.
func (s *Snapshotter) busy(id string) bool {
	s.locks.mu.Lock()
	locked := s.locks.held[id] != nil
	s.locks.mu.Unlock()
	s.work.mu.Lock()
	defer s.work.mu.Unlock()
	return locked || s.work.running[id] != nil
}

// Check compares the database with the folders, the folders' parts with each other, and the mounts with both. It reads
// indexes but no layer files. again is how long it waits before it looks a second time at what seems wrong.
func (s *Snapshotter) Check(ctx context.Context, again time.Duration) ([]Flaw, error) {
	suspects, err := s.suspects(ctx, nil)
	if err != nil || len(suspects) == 0 {
		return nil, err
	}
	select {
	case <-time.After(again):
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	confirmed, err := s.suspects(ctx, suspects)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(confirmed, func(f Flaw) bool { return !slices.Contains(suspects, f) }), nil
}

// suspects looks once, at all snapshots or at those that only names.
func (s *Snapshotter) suspects(ctx context.Context, only []Flaw) ([]Flaw, error) {
	all, err := s.loadHeld(ctx)
	if err != nil {
		return nil, err
	}
	mounts, err := s.mountTable()
	if err != nil {
		return nil, err
	}
	var found []Flaw
	for id, h := range all {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if only != nil && !slices.ContainsFunc(only, func(f Flaw) bool { return f.ID == id }) || s.busy(id) {
			continue
		}
		if flaws := s.examine(ctx, id, h, s.shownBy(mounts, id)); !s.busy(id) {
			found = append(found, flaws...)
		}
	}
	strays, err := s.strays(all, mounts)
	found = append(found, strays...)
	slices.SortFunc(found, func(a, b Flaw) int { return strings.Compare(a.Path+string(a.Part), b.Path+string(b.Part)) })
	return found, err
}

// examine looks at one snapshot.
func (s *Snapshotter) examine(ctx context.Context, id string, h held, mounted shown) (found []Flaw) {
	flaw := func(p Part, path string, d digest.Digest, format string, a ...any) {
		found = append(found, Flaw{ID: id, Key: h.key, Kind: h.Kind, Part: p, Path: path, DiffID: d, Problem: fmt.Sprintf(format, a...)})
	}
	if h.Kind == snapshots.KindView && len(h.parents) > 0 {
		return nil // it has no folder
	}
	if !exists(s.dir(id)) {
		flaw(PartFolder, s.dir(id), "", "the snapshot's folder is gone")
		return found
	}
	if problem := s.upperProblem(id, mounted.upper); problem != "" && !s.isTar(id) {
		flaw(PartUpper, s.upperFile(id), "", "%s", problem)
		return found
	}
	// One in an upper file is made, or mounted again, when its mounts are asked for.
	empty, _ := isEmpty(s.dir(id))
	unmade := empty && (s.mode == "" || s.fileSize(ctx, h.Info) > 0)
	if h.Kind == snapshots.KindActive && !s.hasUpperFile(id) && !unmade {
		for _, d := range []string{s.upper(id), s.workdir(id)} {
			if !exists(d) {
				flaw(PartFolder, d, "", "the folder that a container writes to is gone")
			}
		}
	}
	a, recordErr := s.readRecord(id)
	hasUpper := s.hasUpperFile(id) || exists(s.upper(id))
	described := recordErr == nil || !errors.Is(recordErr, iofs.ErrNotExist)
	switch {
	case s.isTar(id):
		if recordErr != nil {
			flaw(PartRecord, s.record(id), "", "the digest of its layer cannot be read: %v", recordErr)
			break
		}
		for _, f := range s.examineLayer(id, a) {
			flaw(f.Part, f.Path, a.diffID, "%s", f.Problem)
		}
	case exists(s.pending(id)):
	case h.Kind == snapshots.KindCommitted && (described || !hasUpper):
		flaw(PartLayer, s.layer(id), a.diffID, "the link to its layer file is missing")
	}
	if b, err := os.ReadFile(s.usage(id)); err == nil {
		var inodes, size int64
		if _, err := fmt.Sscanf(string(b), "%d %d\n", &inodes, &size); err != nil {
			flaw(PartUsage, s.usage(id), "", "it does not hold two numbers")
		}
	}
	if exists(s.extracting(id)) {
		flaw(PartLeftover, s.extracting(id), "", "an extraction neither ended nor was undone")
	}
	entries, _ := os.ReadDir(s.dir(id))
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".tmp") && aged(filepath.Join(s.dir(id), e.Name())) {
			flaw(PartLeftover, filepath.Join(s.dir(id), e.Name()), "", "half of a file")
		}
	}
	if shown := mounted.layer; shown != "" && shown != s.index(id) {
		flaw(PartMount, s.mountpoint(id), a.diffID, "it shows %s instead of %s", shown, s.index(id))
	}
	return found
}

// shown are the files that the mount points of a snapshot show; "" where nothing is mounted.
type shown struct{ layer, upper string }

func (l layout) shownBy(mounts map[string][]string, id string) shown {
	top := func(target string) string {
		if all := mounts[target]; len(all) > 0 {
			return all[len(all)-1]
		}
		return ""
	}
	return shown{layer: top(l.mountpoint(id)), upper: top(l.upperMount(id))}
}

// upperProblem says what is wrong with an upper file; "" for nothing, or if there is none. mounted is what is mounted
// where it belongs.
func (l layout) upperProblem(id, mounted string) string {
	if err := l.lostUpper(id); err != nil {
		if mounted == l.upperFile(id) { // as the kernel calls it, also if it is gone
			return fmt.Sprintf("%v; it is still mounted: save what is needed from %s", err, filepath.Join(l.upperMount(id), "upper"))
		}
		return err.Error()
	}
	if !l.hasUpperFile(id) {
		return ""
	}
	super, err := readSuperblock(l.upperFile(id))
	switch {
	case err != nil:
		return err.Error()
	case super == nil: // lost with the power, and made again when it is asked for
		return ""
	case mounted != "" && mounted != l.upperFile(id):
		return fmt.Sprintf("%s shows %s instead of it", l.upperMount(id), mounted)
	}
	return superblockProblem(super)
}

// examineLayer looks at the parts of a tar layer.
func (s *Snapshotter) examineLayer(id string, a adopted) (found []Flaw) {
	fi, err := os.Stat(s.layer(id))
	if err != nil {
		return []Flaw{{Part: PartLayer, Path: s.layer(id), Problem: err.Error()}}
	}
	if fi.Size() != a.size {
		found = append(found, Flaw{Part: PartLayer, Path: s.layer(id), Problem: fmt.Sprintf("the layer file has %d bytes instead of %d", fi.Size(), a.size)})
	}
	if path, err := s.layers.Path(a.diffID); err == nil {
		switch named, err := os.Stat(path); {
		case errors.Is(err, iofs.ErrNotExist):
			found = append(found, Flaw{Part: PartLayer, Path: path, Problem: "the layer file has lost its name"})
		case err == nil && !os.SameFile(named, fi):
			found = append(found, Flaw{Part: PartLayer, Path: s.layer(id), Problem: "it links another file than the layer's"})
		}
	}
	for _, index := range []string{s.index(id), s.lowestIndex(id)} {
		if err := verifyIndex(index); err != nil && !errors.Is(err, iofs.ErrNotExist) {
			found = append(found, Flaw{Part: PartIndex, Path: index, Problem: fmt.Sprintf("the index is damaged (%v)", err)})
		}
	}
	return found
}

func aged(path string) bool {
	fi, err := os.Lstat(path)
	return err == nil && time.Since(fi.ModTime()) > leftAfter
}

// strays are folders, mounts and loop devices without a snapshot.
func (s *Snapshotter) strays(all map[string]held, mounts map[string][]string) ([]Flaw, error) {
	names, err := s.unknown(func(name string) bool { _, ok := all[name]; return ok })
	if err != nil {
		return nil, err
	}
	var found []Flaw
	for _, name := range names {
		switch {
		case s.busy(name):
		case aged(s.dir(name)):
			found = append(found, Flaw{Part: PartLeftover, Path: s.dir(name), Problem: "a folder of no snapshot"})
		case !exists(s.dir(name)): // a folder that is there goes with the next clean-up, and its mount first
			path := s.mountpoint(name)
			if !exists(path) {
				path = s.upperMount(name)
			}
			found = append(found, Flaw{Part: PartMount, Path: path, Problem: "a mount point of no snapshot"})
		}
	}
	for _, l := range idleLoops(s.root) {
		found = append(found, Flaw{Part: PartLoop, Path: l.device, Problem: "it is attached to " + l.file + " and nothing uses it"})
	}
	return found, nil
}

// mountTable returns what is mounted below mnt/, the topmost last, by the file that it shows: a loop device's is the one
// that is attached to it.
func (s *Snapshotter) mountTable() (map[string][]string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	table := map[string][]string{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(tail) < 2 || !strings.HasPrefix(fields[4], s.mountsDir()+"/") {
			continue
		}
		source := tail[1]
		if name, ok := strings.CutPrefix(source, "/dev/loop"); ok {
			source = loopFile("loop" + name)
		}
		table[fields[4]] = append(table[fields[4]], strings.TrimSuffix(source, "//deleted"))
	}
	return table, lines.Err()
}

func loopFile(name string) string {
	b, err := os.ReadFile(filepath.Join("/sys/block", name, "loop/backing_file"))
	if err != nil {
		return "/dev/" + name
	}
	return strings.TrimSuffix(strings.TrimSpace(string(b)), " (deleted)")
}

type idleLoop struct{ device, file string }

// idleLoops are loop devices on files of snapshots that nobody has open or mounted. Those that this package attaches go
// by themselves.
func idleLoops(root string) (found []idleLoop) {
	names, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, n := range names {
		name := filepath.Base(filepath.Dir(filepath.Dir(n)))
		file := loopFile(name)
		if !strings.HasPrefix(file, filepath.Join(root, "snapshots")+"/") || exists(filepath.Dir(file)) {
			continue
		}
		fd, err := unix.Open("/dev/"+name, unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // in use
		}
		_ = unix.Close(fd)
		found = append(found, idleLoop{"/dev/" + name, file})
	}
	return found
}

// LayerFile is a file that snapshots show.
type LayerFile struct {
	DiffID digest.Digest
	Size   int64 // that it should have, in bytes
	Path   string
	IDs    []string
	Keys   []string
}

// LayerFiles lists the files that committed snapshots link, once each.
func (s *Snapshotter) LayerFiles(ctx context.Context) ([]LayerFile, error) {
	all, err := s.loadHeld(ctx)
	if err != nil {
		return nil, err
	}
	type inode struct{ dev, ino uint64 }
	byInode := map[inode]*LayerFile{}
	for id, h := range all {
		var st unix.Stat_t
		if h.Kind != snapshots.KindCommitted || unix.Stat(s.layer(id), &st) != nil {
			continue
		}
		a, err := s.readRecord(id)
		if err != nil {
			continue // Check says so
		}
		f := byInode[inode{st.Dev, st.Ino}]
		if f == nil {
			f = &LayerFile{DiffID: a.diffID, Size: a.size, Path: s.layer(id)}
			byInode[inode{st.Dev, st.Ino}] = f
		}
		f.IDs, f.Keys = append(f.IDs, id), append(f.Keys, h.key)
	}
	var files []LayerFile
	for _, f := range byInode {
		slices.Sort(f.IDs)
		slices.Sort(f.Keys)
		files = append(files, *f)
	}
	slices.SortFunc(files, func(a, b LayerFile) int { return strings.Compare(a.Path, b.Path) })
	return files, nil
}
