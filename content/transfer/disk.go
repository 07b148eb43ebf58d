package transfer

import (
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

const (
	dataName  = "data"
	stateName = "state"
	locksName = "locks"

	// servedName is an empty file: the image that the blob was fetched for is complete. Anybody may make it.
	servedName = "served"
)

// folder is a transfer's place on disk. Whoever holds its lock exclusively may write it.
type folder struct {
	path  string
	blob  Blob
	data  *os.File
	state *stateFile // nil when the data is sealed
	log   *stateLog  // what the state file said when it was opened

	// sealed data was called complete or has other hard links: it must never be written again.
	sealed bool
}

// folderName finds the folder's name: the plain one unless a transfer of another size has it.
func folderName(root string, b Blob) string {
	name := plainName(b)
	size, ok := peekSize(filepath.Join(root, name, stateName))
	if ok && size != b.Size {
		return sizedName(b)
	}
	return name
}

func plainName(b Blob) string { return "sha256-" + b.Digest.Encoded() }

func sizedName(b Blob) string { return fmt.Sprintf("%s.%d", plainName(b), b.Size) }

// folderDigest is the hex digest in a folder's name; "" for a name that is none.
func folderDigest(name string) string {
	rest, ok := strings.CutPrefix(name, "sha256-")
	encoded, _, _ := strings.Cut(rest, ".")
	if !ok || len(encoded) != 64 {
		return ""
	}
	return encoded
}

// openFolder opens what an earlier transfer left, or makes an empty folder. finished: only a finished one will do, and
// the error is errNeedsLock if it is none.
func openFolder(path string, b Blob, finished bool) (*folder, error) {
	f := &folder{path: path, blob: b}
	if finished {
		return f, f.reopenFinished()
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, err
	}
	if err := f.reopen(); err == nil {
		return f, nil
	} else if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errStateHeader) {
		return nil, err
	}
	if err := f.reset(); err != nil {
		return nil, err
	}
	return f, nil
}

func (f *folder) reopenFinished() error {
	err := f.reopen()
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, errStateHeader):
		return errNeedsLock
	case err == nil && !f.sealed:
		return errors.Join(errNeedsLock, f.closeState(), f.data.Close())
	}
	return err
}

func (f *folder) reopen() (err error) {
	state, log, err := openState(filepath.Join(f.path, stateName))
	if err != nil {
		return err
	}
	defer func() {
		if err != nil || f.sealed {
			err = errors.Join(err, state.Close())
		}
	}()
	if log.blob() != f.blob {
		return errStateHeader
	}
	path := filepath.Join(f.path, dataName)
	st, err := os.Lstat(path)
	if err != nil {
		return err
	}
	f.sealed = log.complete || links(st) > 1
	flag := os.O_RDWR
	if f.sealed {
		flag = os.O_RDONLY
	}
	data, err := os.OpenFile(path, flag|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	if !f.sealed && st.Size() != f.blob.Size {
		if err := data.Truncate(f.blob.Size); err != nil {
			return errors.Join(err, data.Close())
		}
	}
	f.data, f.log = data, log
	if !f.sealed {
		f.state = state
	}
	return nil
}

// reset starts from nothing, in a new file: old readers and hard links keep the old one.
func (f *folder) reset() error {
	if err := f.remove(); err != nil {
		return err
	}
	if err := os.Mkdir(f.path, 0o700); err != nil {
		return err
	}
	data, err := os.OpenFile(filepath.Join(f.path, dataName), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := data.Truncate(f.blob.Size); err != nil {
		return errors.Join(err, data.Close())
	}
	sum, err := hex.DecodeString(f.blob.Digest.Encoded())
	if err != nil {
		return errors.Join(err, data.Close())
	}
	state, err := createState(filepath.Join(f.path, stateName), f.blob.Size, [32]byte(sum))
	if err != nil {
		return errors.Join(err, data.Close())
	}
	f.data, f.state, f.sealed = data, state, false
	f.log = &stateLog{
		stateHeader: stateHeader{size: f.blob.Size, sum: [32]byte(sum), generation: state.generation},
		blocks:      map[uint32]record{},
	}
	return nil
}

// remove deletes the folder; open files stay open.
func (f *folder) remove() error {
	err := f.closeState()
	return errors.Join(err, os.RemoveAll(f.path))
}

func (f *folder) closeState() error {
	if f.state == nil {
		return nil
	}
	err := f.state.Close()
	f.state = nil
	return err
}

// openLog opens the state file once more, to read it: it says what was here when the folder is long reset.
func (f *folder) openLog() (*os.File, error) { return os.Open(filepath.Join(f.path, stateName)) }

// unrecord has the state file forget blocks, by block number. It is replaced in one step: a crash leaves the old one or
// the new one, and with the new one a resume trusts nothing that was forgotten.
func (f *folder) unrecord(gone []bool) (err error) {
	path := filepath.Join(f.path, stateName)
	log, err := peekState(path)
	if err != nil {
		return err
	}
	state, err := createState(path+".new", log.size, log.sum)
	if err != nil {
		return err
	}
	f.log = log
	for _, r := range f.recorded() {
		if gone[r.block] {
			delete(log.blocks, r.block)
			continue
		}
		if err := state.append(kindBlock, r); err != nil {
			return errors.Join(err, state.Close())
		}
	}
	// Without the fsync a power cut could leave an empty file of that name.
	if err := errors.Join(state.f.Sync(), os.Rename(path+".new", path), f.data.Chmod(0o600)); err != nil {
		return errors.Join(err, state.Close())
	}
	old := f.state
	f.state = state
	return old.Close()
}

// record notes that the first n bytes of the block that holds last are there.
func (f *folder) record(block uint32, length int64, crc uint32) error {
	return f.state.append(kindBlock, record{block: block, length: uint32(length), crc: crc})
}

// seal records that the data is complete. The data must be durable.
func (f *folder) seal() error {
	if f.sealed {
		return nil
	}
	if err := f.state.append(kindComplete, record{}); err != nil {
		return err
	}
	f.sealed = true
	return f.closeState()
}

// syncData makes the data durable, with the mode that a finished blob has.
func (f *folder) syncData() error {
	if f.sealed {
		return nil
	}
	if err := f.data.Chmod(0o444); err != nil {
		return err
	}
	return f.data.Sync()
}

// recorded lists the recorded blocks in order, as spans of bytes that are said to be there.
func (f *folder) recorded() []record {
	recs := make([]record, 0, len(f.log.blocks))
	for _, r := range f.log.blocks {
		recs = append(recs, r)
	}
	slices.SortFunc(recs, func(a, b record) int { return int(int64(a.block) - int64(b.block)) })
	return recs
}

// holds reports whether the data on disk matches a record. buf has room for a block.
func (f *folder) holds(r record, buf []byte) (bool, error) {
	p := buf[:r.length]
	if _, err := f.data.ReadAt(p, int64(r.block)*blockSize); err != nil {
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if errors.Is(err, syscall.EIO) { // a bad sector: the block is fetched again
			return false, nil
		}
		return false, err
	}
	return crc32.Checksum(p, castagnoli) == r.crc, nil
}

// links is the number of hard links of a file.
func links(st fs.FileInfo) uint64 {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return uint64(sys.Nlink)
	}
	return 1
}

// full says whether it is the disk that has no room.
func full(err error) bool { return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) }

// diskError says what a full disk means and what to do about it.
func diskError(path string, err error) error {
	if full(err) {
		var at *fs.PathError
		if errors.As(err, &at) {
			err = at.Err // the path says no more
		}
		return fmt.Errorf("the disk of %s is full, free some space and pull again, what was fetched is kept: %w: %w",
			filepath.Dir(path), err, errdefs.ErrResourceExhausted)
	}
	return fmt.Errorf("%s: %w", path, err)
}
