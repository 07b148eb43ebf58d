package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/log"
)

// tail reads a folder that somebody else writes. It needs no lock and writes nothing.
type tail struct {
	folder   *folder // data read only; its log grows with the file
	state    *os.File
	off      int64 // how far the state file was read
	frontier int64 // bytes from the start that are recorded and match their records
	hidden   int64 // readers have so many bytes of another file: the frontier is not shown until it is there
	received int64
	buf      []byte
}

// openTail opens a folder for reading. fs.ErrNotExist or errStateHeader: its holder is about to make it.
func openTail(path string, b Blob) (t *tail, err error) {
	state, err := os.Open(filepath.Join(path, stateName))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, state.Close())
		}
	}()
	h, err := peekHeader(state)
	if errors.Is(err, io.EOF) || err == nil && h.blob() != b {
		return nil, errStateHeader
	}
	if err != nil {
		return nil, err
	}
	data, err := os.OpenFile(filepath.Join(path, dataName), os.O_RDONLY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	f := &folder{path: path, blob: b, data: data, sealed: true, log: &stateLog{stateHeader: h, blocks: map[uint32]record{}}}
	t = &tail{folder: f, state: state, off: headerSize}
	// The state file goes last and comes last when a folder starts again: as long as this one is in place, so was its data.
	if !t.current() {
		return nil, errors.Join(errStateHeader, data.Close())
	}
	return t, nil
}

// current reports whether the folder still is the one that was opened.
func (t *tail) current() bool {
	ours, err := t.state.Stat()
	if err != nil {
		return false
	}
	named, err := os.Stat(t.state.Name())
	return err == nil && os.SameFile(ours, named)
}

// read takes in the records that were added. contradicted: one of them says that bytes below the frontier are others now.
func (t *tail) read() (moved, contradicted bool, err error) {
	if t.buf == nil {
		t.buf = make([]byte, blockSize)
	}
	for {
		n, err := t.state.ReadAt(t.buf[:len(t.buf)/recordSize*recordSize], t.off)
		n -= n % recordSize
		for b := t.buf[:n]; len(b) > 0; b = b[recordSize:] {
			contradicted = t.add(b[:recordSize]) || contradicted
		}
		t.off += int64(n)
		moved = moved || n > 0
		if errors.Is(err, io.EOF) || n == 0 {
			return moved, contradicted, nil
		}
		if err != nil {
			return moved, contradicted, err
		}
	}
}

func (t *tail) add(b []byte) (contradicted bool) {
	log := t.folder.log
	kind, r := log.decode(b)
	if kind != kindBlock {
		return false
	}
	old := log.blocks[r.block]
	log.blocks[r.block] = r
	t.received += int64(r.length) - int64(old.length)
	return int64(r.block) < t.frontier/blockSize && old != r
}

// next checks the next block, or what is new of one that is there in part, and moves the frontier over it. The bytes
// are valid until the next call; there are none if the block is not there yet.
func (t *tail) next() ([]byte, error) {
	block := uint32(t.frontier / blockSize)
	have := t.frontier % blockSize
	r := t.folder.log.blocks[block]
	if int64(r.length) <= have {
		return nil, nil
	}
	ok, err := t.folder.holds(r, t.buf)
	if err != nil {
		return nil, diskError(t.folder.path, err)
	}
	if !ok { // left by a crash: its holder finds out too, and records the block again
		delete(t.folder.log.blocks, block)
		t.received -= int64(r.length)
		return nil, nil
	}
	t.frontier += int64(r.length) - have
	return t.buf[have:r.length], nil
}

// close leaves the data open if the job has it now.
func (t *tail) close(used bool) error {
	err := t.state.Close()
	if !used {
		err = errors.Join(err, t.folder.data.Close())
	}
	return err
}

// follow shows what the holder of a folder fetches until this process has something to do itself: then it holds the
// lock. Without one: look around again, for the holder is stuck or the blob was finished elsewhere.
func (j *job) follow(ctx context.Context, name string) (*holding, error) {
	j.announce(ctx, name)
	looked := time.Now()
	for poll := lockPollMin; ; poll = min(2*poll, lockPollMax) {
		moved, err := j.watchTail(ctx, name)
		if err != nil {
			return nil, err
		}
		if hold, err := j.relieve(ctx, name); hold != nil || err != nil {
			return hold, err
		}
		if moved {
			poll = lockPollMin
		}
		if err := sleep(ctx, poll); err != nil {
			return nil, err
		}
		if j.idles(name) {
			return nil, nil
		}
		if time.Since(looked) >= lockPollMax {
			if j.places.finished(name) != "" {
				return nil, nil
			}
			looked = time.Now()
		}
	}
}

// leaveTail closes what is open only to follow; what readers read stays.
func (j *job) leaveTail() error {
	t := j.places.tail
	j.places.tail = nil
	if t == nil {
		return nil
	}
	return t.close(j.uses(t.folder))
}

func (j *job) uses(f *folder) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.folder == f
}

// announce says who is waited for.
func (j *job) announce(ctx context.Context, name string) {
	if j.places.following == name {
		return
	}
	j.places.following = name
	j.logger(ctx, name).Infof("%s fetches the blob: following it", holder(lockPath(j.root, name)))
	j.setPhase(PhaseLock)
}

// relieve takes the lock when the holder is done or gone.
func (j *job) relieve(ctx context.Context, name string) (*holding, error) {
	h, err := j.take(name)
	if h == nil && err == nil && j.places.complete(name) {
		h, err = tryShared(j.root, name)
	}
	if h == nil || err != nil {
		return nil, err
	}
	j.places.following = ""
	delete(j.places.vigils, name)
	if j.places.complete(name) {
		j.logger(ctx, name).Info("the blob that was waited for is complete")
	} else {
		j.logger(ctx, name).Infof("whoever fetched the blob has stopped: going on from %d of %d bytes", j.shown(), j.blob.Size)
	}
	return h, nil
}

func (j *job) logger(ctx context.Context, name string) *log.Entry {
	return log.G(ctx).WithField("digest", j.blob.Digest).WithField("folder", folderPath(j.root, name))
}

func (j *job) shown() int64 {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.frontier
}

// watchTail shows what is new in a folder. It opens the folder, again if its holder started again from nothing.
func (j *job) watchTail(ctx context.Context, name string) (moved bool, err error) {
	path := folderPath(j.root, name)
	if t := j.places.tail; t != nil && (t.folder.path != path || !t.current()) {
		if err := j.leaveTail(); err != nil {
			return false, err
		}
	}
	if j.places.tail == nil {
		if err := j.openTail(name); j.places.tail == nil || err != nil {
			return false, err
		}
	}
	t := j.places.tail
	moved, contradicted, err := t.read()
	if err != nil {
		return false, diskError(path, err)
	}
	if contradicted {
		// Its holder found that bytes were wrong which readers may have.
		if err := j.showAnew(t); err != nil {
			return false, err
		}
	}
	return moved, j.catchUp(ctx, t)
}

// openTail opens a folder if there is something in it to follow.
func (j *job) openTail(name string) error {
	if j.places.isRefused(name) {
		return nil
	}
	t, err := openTail(folderPath(j.root, name), j.blob)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errStateHeader) {
		return nil
	}
	if err != nil {
		return diskError(folderPath(j.root, name), err)
	}
	j.places.tail = t
	return j.show(t)
}

// show gives readers the tail's file, at once if they have nothing else.
func (j *job) show(t *tail) error {
	j.mu.Lock()
	old, frontier := j.folder, j.frontier
	j.mu.Unlock()
	if old == nil || frontier == 0 {
		return j.switchTo(t.folder, true)
	}
	if old.path == t.folder.path && !sameAs(old, t.folder) {
		return j.switchTo(t.folder, false) // its holder found the bytes wrong
	}
	t.hidden = frontier
	return nil
}

// showAnew shows the tail's file from its start.
func (j *job) showAnew(t *tail) error {
	t.frontier, t.hidden = 0, 0
	return j.switchTo(t.folder, false)
}

// catchUp moves the frontier over the blocks that are there, hashing them.
func (j *job) catchUp(ctx context.Context, t *tail) error {
	for {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p, err := t.next()
		if err != nil {
			return err
		}
		if t.hidden > 0 && t.frontier >= t.hidden {
			if err := j.reveal(ctx, t); err != nil {
				return err
			}
			continue
		}
		if t.hidden == 0 {
			if err := j.followed(ctx, t, p); err != nil {
				return err
			}
		}
		if len(p) == 0 {
			return nil
		}
	}
}

// reveal gives readers the tail's file instead of the one they have, now that it holds as much.
func (j *job) reveal(ctx context.Context, t *tail) error {
	j.mu.Lock()
	old := j.folder
	j.mu.Unlock()
	same, err := samePrefix(ctx, old, t.folder, t.hidden)
	if err != nil {
		return err
	}
	if !same {
		return j.showAnew(t)
	}
	t.frontier, t.hidden = t.hidden, 0
	return j.switchTo(t.folder, true)
}

// followed shows bytes that another process fetched.
func (j *job) followed(ctx context.Context, t *tail, p []byte) error {
	j.mu.Lock()
	if n := t.received - j.elsewhere; n > 0 && j.elsewhere > 0 {
		j.rate.add(n)
	}
	j.elsewhere = t.received
	if len(p) > 0 {
		j.frontier = t.frontier
		if j.firstByte.IsZero() {
			j.firstByte = time.Now()
		}
		j.wake()
	}
	j.mu.Unlock()
	d := j.digester()
	if d.off == t.frontier-int64(len(p)) {
		d.add(p)
		return nil
	}
	return j.hashUpTo(ctx, d, t.folder, t.frontier)
}

// switchTo makes f the folder that readers read. same: f has the bytes that they had so far; otherwise they start again.
func (j *job) switchTo(f *folder, same bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	old := j.folder
	j.folder = f
	j.elsewhere = 0
	if !same {
		j.generation++
		j.frontier, j.verified = 0, false
	}
	j.wake()
	if old == nil || old == f {
		return nil
	}
	return errors.Join(old.closeState(), old.data.Close())
}

func sameData(a, b *folder) bool {
	x, err := a.data.Stat()
	if err != nil {
		return false
	}
	y, err := b.data.Stat()
	return err == nil && os.SameFile(x, y)
}

// sameAs reports whether two looks at a folder saw the same bytes, more or less of them. A holder that finds some of them
// wrong begins a new state file, and may go on in the data file.
func sameAs(a, b *folder) bool { return sameData(a, b) && a.log.generation == b.log.generation }

// samePrefix compares the first n bytes of two folders.
func samePrefix(ctx context.Context, a, b *folder, n int64) (bool, error) {
	if sameData(a, b) {
		return sameAs(a, b), nil
	}
	p, q := make([]byte, blockSize), make([]byte, blockSize)
	for off := int64(0); off < n; off += blockSize {
		if ctx.Err() != nil {
			return false, context.Cause(ctx)
		}
		want := min(blockSize, n-off)
		for _, r := range []struct {
			f *folder
			p []byte
		}{{a, p}, {b, q}} {
			if m, err := r.f.data.ReadAt(r.p[:want], off); int64(m) < want {
				return false, diskError(r.f.path, fmt.Errorf("compare at %d: %w", off, err))
			}
		}
		if !bytes.Equal(p[:want], q[:want]) {
			return false, nil
		}
	}
	return true, nil
}

// holder names the process that has a lock, as well as the system tells.
func holder(lock string) string {
	pid := lockOwner(lock)
	if pid <= 0 {
		return "another process"
	}
	if pid == os.Getpid() {
		return "an earlier transfer of this process"
	}
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err == nil {
		return fmt.Sprintf("process %d (%s)", pid, strings.TrimSpace(string(name)))
	}
	return fmt.Sprintf("process %d", pid)
}
