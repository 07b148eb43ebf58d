package transfer

import (
	"os"
	"time"
)

// A blob that is unpacked as it arrives is written once, read by the hash and by the unpack, and then hardly ever again.
// Its pages are dropped from the page cache behind both, so that the memory serves what comes next and the pages of what
// runs on the node stay: a pull of 1 GB took 1 GB of page cache for nothing.
//
// This must not cost a read from disk. So nothing is dropped above the hash or above a handle that reads and has not
// said (Handle.Discard) that it is done, nothing where nobody has said so, because an unpack may be waiting for its turn,
// and nothing that was given to the disk just now: the kernel keeps pages that are not written back, and nobody asks again
// before the end. Only processes that follow this one are not seen; one that lags by more than dropLag reads from disk.

// dropLag is how many bytes may lie between what write-back was begun of and what is dropped.
const dropLag = 4 * writebackStep

// A download that is faster than the unpack only moves the work behind the last byte, and puts more into the page cache
// than is read from it soon. So no chunk is asked for while a reader that moves, or beside it the hash, is more than backlogMax
// bytes behind the frontier. One that has not moved for patientFor (it waits for a worker, or for its client) holds nothing up, whatever
// others do, and what is under way is never stopped. Measured with a layer of 1 GB from a registry without limits, two
// cores for all: the pull took 3.1 to 3.7 s instead of 3.9 to 5.5 s, because what is unpacked is still in the caches.
const (
	backlogMax  = 16 << 20
	readChunk   = 16 << 20 // the most that a request asks for where somebody reads
	patientFor  = 300 * time.Millisecond
	backlogTick = 20 * time.Millisecond // how often a transfer that is held back looks whether it still is
)

// behind is how far those are who need the pages. Guarded by job.mu.
type behind struct {
	hashed     int64
	generation int                  // of what is hashed
	readers    map[*Handle]progress // handles that read
}

// progress is how far a reader is.
type progress struct {
	mark  int64 // what lies below is needed no more
	moved time.Time
}

// reads notes a handle that reads. Called with mu held.
func (j *job) reads(h *Handle) {
	if _, ok := j.behind.readers[h]; !ok && j.discard == nil {
		j.behind.readers[h] = progress{}
	}
}

// rereads is for a handle that starts again. Called with mu held.
func (j *job) rereads(h *Handle) { delete(j.behind.readers, h) }

// hashedBehind notes how far the hash has come. Called with mu held.
func (j *job) hashedBehind(d *digester) {
	j.behind.hashed, j.behind.generation = d.off, d.generation
}

// droppable is up to where nobody needs the pages any more; 0 if nobody reads. Called with mu held.
func (j *job) droppable() int64 {
	b := &j.behind
	if len(b.readers) == 0 || b.generation != j.generation {
		return 0
	}
	n := b.hashed
	for h, r := range b.readers {
		if h.generation != j.generation {
			return 0
		}
		n = min(n, r.mark)
	}
	return n
}

// lag is how far the last reader that keeps moving is behind the frontier, or the hash, which nobody can do without; ok
// is false if no reader moves. Called with mu held.
func (j *job) lag() (n int64, ok bool) {
	now := time.Now()
	if j.behind.generation == j.generation {
		n = j.frontier - j.behind.hashed
	}
	for h, r := range j.behind.readers {
		if h.generation == j.generation && r.mark > 0 && now.Sub(r.moved) < patientFor {
			n, ok = max(n, j.frontier-r.mark), true
		}
	}
	return n, ok
}

// backlogged says whether those who read should catch up before more is fetched. Called with mu held.
func (j *job) backlogged() bool {
	n, ok := j.lag()
	return ok && n > backlogMax
}

// dropBehind drops pages from off on that nobody needs, where write-back was begun up to begun. It returns up to where.
func (j *job) dropBehind(off, begun int64) int64 {
	j.mu.Lock()
	end := min(j.droppable(), begun-dropLag) / writebackStep * writebackStep
	f := j.folder.data
	j.mu.Unlock()
	if end <= off {
		return off
	}
	j.shared.dropPages(f, off, end-off)
	return end
}

// readThrough forgets a reader. It returns the file if nobody is left who reads and all of it was read, verified and
// is durable, so that no page of it is needed. Called with mu held.
func (j *job) readThrough(h *Handle) *os.File {
	mark := j.behind.readers[h].mark
	delete(j.behind.readers, h)
	if j.phase != PhaseComplete || j.discard != nil || mark < j.blob.Size || len(j.behind.readers) > 0 || h.generation != j.generation {
		return nil
	}
	return j.folder.data
}
