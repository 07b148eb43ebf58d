package snapshotter

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	digest "github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// layout knows where the parts of a snapshot lie.
type layout struct{ root string }

func (l layout) snapshotsDir() string       { return filepath.Join(l.root, "snapshots") }
func (l layout) mountsDir() string          { return filepath.Join(l.root, "mnt") }
func (l layout) dir(id string) string       { return filepath.Join(l.root, "snapshots", id) }
func (l layout) upper(id string) string     { return filepath.Join(l.writable(id), "upper") }
func (l layout) workdir(id string) string   { return filepath.Join(l.writable(id), "work") }
func (l layout) upperFile(id string) string { return filepath.Join(l.dir(id), "upper.ext4") }
func (l layout) upperMount(id string) string {
	return filepath.Join(l.root, "mnt", id+upperMountSuffix)
}
func (l layout) upperSynced(id string) string { return filepath.Join(l.dir(id), "upper.synced") }
func (l layout) layer(id string) string       { return filepath.Join(l.dir(id), "layer") }
func (l layout) index(id string) string       { return filepath.Join(l.dir(id), "index") }
func (l layout) lowestIndex(id string) string { return filepath.Join(l.dir(id), "index.lowest") }
func (l layout) onlyLowest(id string) string  { return filepath.Join(l.dir(id), "onlylowest") }
func (l layout) record(id string) string      { return filepath.Join(l.dir(id), "diffid") }
func (l layout) pending(id string) string     { return filepath.Join(l.dir(id), "pending") }
func (l layout) extracting(id string) string  { return filepath.Join(l.dir(id), "extracting") }
func (l layout) shifted(id string) string     { return filepath.Join(l.dir(id), "shifted") }
func (l layout) usage(id string) string       { return filepath.Join(l.dir(id), "usage") }
func (l layout) empty() string                { return filepath.Join(l.root, "empty") }
func (l layout) mountpoint(id string) string  { return filepath.Join(l.root, "mnt", id) }

// upperMountSuffix follows the id in the name of a mount point of an upper file.
// It is short because the options of an overlay must fit in a page.
const upperMountSuffix = ".rw"

// writable is where the upper and work directories are: on the disk, or in the
// upper file, which may not be mounted.
func (l layout) writable(id string) string {
	if l.hasUpperFile(id) {
		return l.upperMount(id)
	}
	return l.dir(id)
}

func (l layout) hasUpperFile(id string) bool { return exists(l.upperFile(id)) }

// upperMounted says whether something is mounted where an upper file belongs.
func (l layout) upperMounted(id string) bool {
	var on, below unix.Stat_t
	return unix.Lstat(l.upperMount(id), &on) == nil && unix.Lstat(l.mountsDir(), &below) == nil && on.Dev != below.Dev
}

// isTar says whether the snapshot is a tar layer; otherwise it is a
// directory, on the disk or in an upper file.
func (l layout) isTar(id string) bool { return exists(l.layer(id)) }

// mounted says whether an EROFS image is mounted at the mount point of id. An
// empty directory there would show as an empty layer, silently.
func (l layout) mounted(id string) bool {
	var st unix.Statfs_t
	return unix.Statfs(l.mountpoint(id), &st) == nil && uint32(st.Type) == unix.EROFS_SUPER_MAGIC_V1
}

// isID accepts what storage makes of its sequence numbers, and nothing else.
func isID(name string) bool {
	n, err := strconv.ParseUint(name, 10, 64)
	return err == nil && strconv.FormatUint(n, 10) == name
}

// adopted is what the file `diffid` holds.
type adopted struct {
	diffID digest.Digest
	size   int64
}

func (l layout) readRecord(id string) (adopted, error) {
	b, err := os.ReadFile(l.record(id))
	if err != nil {
		return adopted{}, err
	}
	var d string
	var a adopted
	if _, err := fmt.Sscanf(string(b), "%s %d\n", &d, &a.size); err != nil {
		return adopted{}, fmt.Errorf("%s: %w", l.record(id), err)
	}
	a.diffID, err = digest.Parse(d)
	return a, err
}

// writeRecord makes the record durable but for its folder.
func (l layout) writeRecord(id string, a adopted) error {
	return writeFile(l.record(id), true, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "%s %d\n", a.diffID, a.size)
		return err
	})
}

// writeFile puts a file in place by rename. A crash leaves name.tmp at most,
// which recover removes.
func writeFile(name string, sync bool, fill func(io.Writer) error) (err error) {
	f, err := os.OpenFile(name+".tmp", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, removeFile(name+".tmp"))
		}
	}()
	err = fill(f)
	if err == nil && sync {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(name+".tmp", name)
}

// syncDir makes the entries of folders durable, or the content of a file.
func syncDir(names ...string) error {
	for _, d := range names {
		f, err := os.Open(d)
		if err != nil {
			return err
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// syncFileSystem makes all durable that was written to the file system of name.
func syncFileSystem(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// removeFile removes a file or an empty directory that may be gone already.
func removeFile(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// isEmpty says whether a directory has no entries; one that is gone has none.
func isEmpty(dir string) (bool, error) {
	f, err := os.Open(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	defer f.Close()
	_, err = f.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	return false, err
}

func exists(name string) bool {
	_, err := os.Lstat(name)
	return err == nil
}

// clearDir removes what is in a directory but not the directory itself, which
// may be mounted somewhere.
func clearDir(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// removeTemporary removes half-made files of a snapshot's folder.
func (l layout) removeTemporary(id string) error {
	entries, err := os.ReadDir(l.dir(id))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".tmp") {
			if err := removeFile(filepath.Join(l.dir(id), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}
