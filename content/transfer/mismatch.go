package transfer

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
)

// distrust is for how long a host that sent wrong bytes is asked only where there is no other.
const distrust = 10 * time.Minute

// download fetches until the digest is right.
func (j *job) download(ctx context.Context) error {
	j.askAll()
	err := j.attempt(ctx)
	if !errors.Is(err, errMismatch) {
		return err
	}
	j.retain()
	q := &inquiry{job: j, asked: map[string]bool{}}
	defer q.close()
	return q.run(ctx, err)
}

// askAll ends what is left of an inquiry that was broken off for another folder, which then was not to be had.
func (j *job) askAll() {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.only = ""
}

// inquiry follows a digest mismatch. Only the whole blob has a digest, so with several hosts nobody knows who lied:
// each gets one chance to serve the whole blob alone, those first that had no part in what was wrong. If that does
// not verify either, the blocks in which the tries differ are fetched a third time: two of three versions agree
// only if one of them is the third, so the third it is. When a try verifies, the earlier ones say who lied.
type inquiry struct {
	job   *job
	tries []*try
	asked map[string]bool // hosts that were asked alone
	wrong []error
}

// try is what is left of one that went wrong. The checksums of its blocks stay in its state file, which is open and
// soon has no name.
type try struct {
	log    *os.File
	served served
}

func (q *inquiry) close() {
	for _, t := range q.tries {
		_ = t.log.Close()
	}
}

func (q *inquiry) run(ctx context.Context, err error) error {
	for {
		q.wrong = append(q.wrong, err)
		if err := q.keep(); err != nil {
			return diskError(q.job.folder.path, err)
		}
		name := q.next()
		if name == "" {
			return q.job.giveUp(q.wrong)
		}
		q.asked[name] = true
		log.G(ctx).WithField("digest", q.job.blob.Digest).WithField("host", name).WithError(err).
			Warn("fetching the whole blob again from one host alone")
		if err = q.alone(ctx, name); err == nil {
			q.tell(ctx)
			return nil
		}
		if !endsTurn(err) {
			return err
		}
	}
}

// next chooses the host that is asked alone next; "" when all were.
func (q *inquiry) next() string {
	j := q.job
	j.mu.Lock()
	defer j.mu.Unlock()
	choice, best := "", 0
	for _, s := range j.sources {
		name := s.host.name
		if s.gone != nil || q.asked[name] {
			continue
		}
		rank := 1
		if slices.ContainsFunc(q.tries, func(t *try) bool { return slices.Contains(t.served.hosts, name) }) {
			rank += 2
		}
		if j.shared.lied(name) {
			rank += 4
		}
		if choice == "" || rank < best {
			choice, best = name, rank
		}
	}
	if choice == "" {
		j.doomed = true
	}
	return choice
}

// endsTurn says whether another host may do better.
func endsTurn(err error) bool {
	return errors.Is(err, errMismatch) || errors.Is(err, errNoSource) || errors.Is(err, errNoProgress)
}

// alone fetches the whole blob from one host, and then once more what differs from the tries before.
func (q *inquiry) alone(ctx context.Context, name string) error {
	j := q.job
	if err := j.restart(name); err != nil {
		return err
	}
	err := j.attempt(ctx)
	if !errors.Is(err, errMismatch) {
		return err
	}
	differ, n, readErr := q.differing()
	if readErr != nil {
		return diskError(j.folder.path, readErr)
	}
	if n == 0 { // the host insists
		return err
	}
	log.G(ctx).WithField("digest", j.blob.Digest).WithField("host", name).WithError(err).
		Warnf("fetching %d blocks of %d KiB that differ between the tries once more", n, blockSize>>10)
	q.wrong = append(q.wrong, err)
	if err := q.keep(); err != nil {
		return diskError(j.folder.path, err)
	}
	if err := j.again(differ); err != nil {
		return err
	}
	return j.attempt(ctx)
}

// keep saves what the present try can tell, before it is dropped.
func (q *inquiry) keep() error {
	f, err := q.job.folder.openLog()
	if err != nil {
		return err
	}
	q.job.mu.Lock()
	defer q.job.mu.Unlock()
	q.tries = append(q.tries, &try{log: f, served: q.job.served.clone()})
	return nil
}

// differing finds the blocks of the present data, which is complete, that were different in another try, and counts them.
func (q *inquiry) differing() (blocks []bool, n int, err error) {
	sums, err := q.job.checksums()
	if err != nil {
		return nil, 0, err
	}
	blocks = make([]bool, len(sums))
	for _, t := range q.tries {
		other, err := t.differing(sums)
		if err != nil {
			return nil, 0, err
		}
		for i, d := range other {
			if d && !blocks[i] {
				blocks[i] = true
				n++
			}
		}
	}
	return blocks, n, nil
}

// differing compares a try with the checksums of another one.
func (t *try) differing(sums []uint32) ([]bool, error) {
	differ := make([]bool, len(sums))
	err := eachBlock(t.log, func(r record) {
		differ[r.block] = r.crc != sums[r.block] // the last record of a block counts
	})
	return differ, err
}

// checksums lists the CRC-32C of each block of the present data, which is complete.
func (j *job) checksums() ([]uint32, error) {
	f, err := j.folder.openLog()
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	sums := make([]uint32, (j.blob.Size+blockSize-1)/blockSize)
	return sums, eachBlock(f, func(r record) { sums[r.block] = r.crc })
}

// eachBlock hands out the records of whole blocks in a state file.
func eachBlock(f *os.File, each func(record)) error {
	h, err := peekHeader(f)
	if err != nil {
		return err
	}
	in := bufio.NewReader(io.NewSectionReader(f, headerSize, 1<<62))
	return h.scan(in, func(b []byte) {
		if kind, r := h.decode(b); kind == kindBlock && int64(r.length) == blockLen(h.size, r.block) {
			each(r)
		}
	})
}

// verdict is what the blocks of one host, or of several in one block, came to.
type verdict struct {
	hosts  string
	blocks int
	first  int64 // offset of the first one
}

// tell names in the log who sent what is not in the data, now that it is verified, and has others preferred to them for
// a while.
func (q *inquiry) tell(ctx context.Context) {
	j := q.job
	l := log.G(ctx).WithField("digest", j.blob.Digest)
	found, err := q.verdicts()
	if err != nil {
		l.WithError(err).Warn("who sent wrong bytes cannot be told")
		return
	}
	for _, v := range found {
		l.WithField("host", v.hosts).WithField("blocks", v.blocks).WithField("offset", v.first).
			Warnf("%s sent wrong bytes: %d blocks of %d KiB, the first at %d; the blob is right now and has none of them",
				v.hosts, v.blocks, blockSize>>10, v.first)
	}
	if len(found) == 0 {
		l.Warn("every block came as it is now: this machine's memory or disk had changed the data")
	}
}

func (q *inquiry) verdicts() ([]verdict, error) {
	sums, err := q.job.checksums()
	if err != nil {
		return nil, err
	}
	var found []verdict
	for _, t := range q.tries {
		differ, err := t.differing(sums)
		if err != nil {
			return nil, err
		}
		for i, d := range differ {
			if !d {
				continue
			}
			names := t.served.names(t.served.code(uint32(i)))
			if len(names) == 1 && names[0] != earlier {
				q.job.shared.caught(names[0])
			}
			found = book(found, strings.Join(names, " and "), int64(i)*blockSize)
		}
	}
	slices.SortFunc(found, func(a, b verdict) int { return cmp.Compare(a.hosts, b.hosts) })
	return found, nil
}

func book(found []verdict, hosts string, off int64) []verdict {
	i := slices.IndexFunc(found, func(v verdict) bool { return v.hosts == hosts })
	if i < 0 {
		return append(found, verdict{hosts: hosts, blocks: 1, first: off})
	}
	found[i].blocks++
	found[i].first = min(found[i].first, off)
	return found
}

// giveUp ends a transfer that no host could bring to its digest. Data that is known to be wrong is dropped; what the last
// host sent before it failed is not.
func (j *job) giveUp(wrong []error) error {
	last := wrong[len(wrong)-1]
	if !errors.Is(last, errMismatch) {
		return fmt.Errorf("the bytes were wrong and could not be fetched again: %w", oneLine(wrong))
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.generation++
	j.frontier = 0
	err := j.folder.remove()
	if i := slices.IndexFunc(wrong, func(err error) bool { return !errors.Is(err, errMismatch) }); i >= 0 {
		return errors.Join(err, fmt.Errorf("no host that answered has the right bytes, the data was dropped: %w", oneLine(wrong)))
	}
	return errors.Join(err, fmt.Errorf("no host has the right bytes, the data was dropped: %w: %w", errdefs.ErrDataLoss, oneLine(wrong)))
}

// restart throws away what was fetched and tells readers so.
func (j *job) restart(only string) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.startOver() // also if this fails: what there was is known to be wrong
	j.served = served{}
	j.only = only
	old := j.folder.data
	if err := j.folder.reset(); err != nil {
		return diskError(j.folder.path, err)
	}
	return old.Close()
}

// again makes blocks missing, by number, and tells readers so.
func (j *job) again(blocks []bool) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.startOver() // also if this fails
	if err := j.folder.unrecord(blocks); err != nil {
		return diskError(j.folder.path, err)
	}
	return nil
}

// startOver has everybody begin at 0. Called with mu held.
func (j *job) startOver() {
	j.ledger = newLedger(j.blob.Size)
	j.forgetDiscarded()
	j.frontier = 0
	j.generation++
	j.touch()
	j.wake()
}

// otherTrusted says whether a host is left that works and sent nothing wrong lately. Called with mu held.
func (j *job) otherTrusted() bool {
	return slices.ContainsFunc(j.sources, func(s *source) bool {
		return s.gone == nil && s.host.fails == 0 && !j.shared.lied(s.host.name)
	})
}

// caught notes that a host sent wrong bytes.
func (s *shared) caught(host string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	maps.DeleteFunc(s.liars, func(_ string, until time.Time) bool { return now.After(until) })
	s.liars[host] = now.Add(distrust)
}

// lied says whether a host sent wrong bytes lately.
func (s *shared) lied(host string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.liars[host])
}
