package content

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/content/clone"
)

const (
	// giveUp is the default of Options.GiveUp.
	giveUp = 2 * time.Minute
	// queue is for how many times GiveUp a leader's client may fetch other blobs
	// before it begins with this one.
	queue = 5
)

// leadKey is what must be the same for one client to follow another.
type leadKey struct {
	namespace string // empty where namespaces share content
	digest    digest.Digest
	size      int64
}

// lead is one client's turn at fetching a blob that no transfer brings, on behalf
// of all who wait for it. A leader waits for nobody.
type lead struct {
	store *Store
	key   leadKey
	ing   *ingest       // the leader's
	whose string        // the leader's namespace
	ended chan struct{} // closed when the turn is over

	// Guarded by Store.mu.
	busy      bool      // its session works on the disk, which takes the time it takes
	since     time.Time // since when the client could have written
	began     bool      // the client has written
	promised  int64     // the offset there will be when it is busy no more
	growing   *Growing  // where its unpack reads
	file      *os.File  // its data, opened once more: an abort does not take that away
	followers int       // who may need file

	// Guarded by Store.mu until the turn is over, and never changed after that.
	over  bool
	done  bool  // the blob is in blobs/, durable and verified
	have  int64 // how many bytes of file are worth having
	spoil bool  // bytes of a failed transfer or of another leader were in what turned out wrong
	err   error // why it is not done
}

// Frontier is how far the leader has come.
func (l *lead) Frontier() int64 {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	switch {
	case l.over:
		return l.have
	case l.busy:
		return max(l.ing.offset, l.promised)
	}
	return l.ing.offset
}

// promise says up to where the leader takes over what is there.
func (l *lead) promise(n int64) {
	l.store.mu.Lock()
	defer l.store.mu.Unlock()
	l.promised = n
}

// CloneTo gives f the bytes of a turn that is over, to one of its followers.
func (l *lead) CloneTo(ctx context.Context, f *os.File, off int64) (int64, error) {
	l.store.mu.Lock()
	src := l.file
	l.store.mu.Unlock()
	if src == nil { // it ended before it began
		return 0, nil
	}
	return clone.Range(ctx, f, src, off, l.have)
}

// key is under what this session leads or follows.
func (s *Session) key() leadKey {
	k := leadKey{digest: s.named, size: s.ing.total}
	if s.store.isolated {
		k.namespace = s.namespace
	}
	return k
}

// led says whether some client fetches the blob right now.
func (s *Store) led(key leadKey) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.leads[key] != nil
}

// elect makes the session the leader if there is none, else one more follower of the
// leader, which has to be left in the end.
func (s *Session) elect() (l *lead, mine bool, err error) {
	store, key := s.store, s.key()
	store.mu.Lock()
	defer store.mu.Unlock()
	if s.ing.dead {
		return nil, false, s.ing.aborted()
	}
	if l := store.leads[key]; l != nil {
		l.followers++
		return l, false, nil
	}
	l = &lead{store: store, key: key, ing: s.ing, whose: s.namespace, ended: make(chan struct{}), busy: true}
	store.leads[key], s.ing.lead = l, l
	return l, true, nil
}

// leave ends a follower's interest in what l has. nil is nobody.
func (s *Store) leave(l *lead) {
	if l == nil {
		return
	}
	s.mu.Lock()
	l.followers--
	unused := l.unused()
	s.mu.Unlock()
	closeUnused(unused)
}

// unused takes the file when nobody will need it. The caller holds mu.
func (l *lead) unused() *os.File {
	if !l.over || l.followers > 0 {
		return nil
	}
	f := l.file
	l.file = nil
	return f
}

func closeUnused(f *os.File) {
	if f != nil {
		_ = f.Close() // read-only: nothing to lose
	}
}

// end ends a turn; f says how it went. A second call does nothing, and so does
// one for nobody's turn.
func (s *Store) end(l *lead, f func(*lead)) {
	if l == nil {
		return
	}
	s.mu.Lock()
	unused := s.endLocked(l, f)
	s.mu.Unlock()
	closeUnused(unused)
}

func (s *Store) endLocked(l *lead, f func(*lead)) (unused *os.File) {
	if l.over {
		return nil
	}
	l.over, l.have = true, l.ing.offset
	f(l)
	l.ing.lead = nil
	delete(s.leads, l.key)
	close(l.ended)
	return l.unused()
}

// leadOf is the turn that ing has, or nil.
func (s *Store) leadOf(ing *ingest) *lead {
	s.mu.Lock()
	defer s.mu.Unlock()
	return ing.lead
}

// resign ends the turn that ing has, if it has one.
func (s *Store) resign(ing *ingest, err error) {
	s.end(s.leadOf(ing), func(l *lead) { l.err = err })
}

// brought ends the turn of whoever leads: ing holds the blob, durable and verified.
func (s *Store) brought(ing *ingest, key leadKey) {
	var unused *os.File
	s.mu.Lock()
	if l := s.leads[key]; l != nil && !ing.dead {
		unused = s.endLocked(l, func(l *lead) { l.done = true })
	}
	s.mu.Unlock()
	closeUnused(unused)
}

// busy notes whether ing's session works on the disk, if it leads.
func (s *Store) busy(ing *ingest, busy bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := ing.lead; l != nil {
		l.busy, l.since = busy, time.Now()
	}
}

// overdue ends a turn whose client has written nothing for too long. Otherwise it
// returns after how long to look again.
func (s *Store) overdue(l *lead) time.Duration {
	var unused *os.File
	s.mu.Lock()
	rest, growing := l.rest(), l.growing
	if rest <= 0 {
		unused = s.endLocked(l, func(l *lead) {
			l.err = fmt.Errorf("blob %s: the client of ref %q has written nothing for %s, it has %d of %d bytes: %w",
				l.key.digest, l.ing.ref, time.Since(latest(l.since, l.ing.updated)).Round(time.Millisecond), l.have, l.key.size, errdefs.ErrUnavailable)
		})
	}
	s.mu.Unlock()
	if rest > 0 {
		return rest
	}
	closeUnused(unused)
	// What unpacks must not wait for it either.
	growing.fail(fmt.Errorf("%w: %w", errdefs.ErrAborted, l.err))
	return s.giveUp
}

// rest is how long the client may still take to write something. One that has yet
// to begin may have others of its blobs to fetch first: containerd opens the
// writers of all layers at once and fetches three at a time. The caller holds mu.
func (l *lead) rest() time.Duration {
	if l.over || l.busy {
		return l.store.giveUp
	}
	if l.began {
		return l.store.giveUp - time.Since(latest(l.since, l.ing.updated))
	}
	rest := l.store.giveUp - time.Since(latest(l.since, l.store.wrote[l.whose]))
	return min(rest, queue*l.store.giveUp-time.Since(l.since))
}

func latest(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// moved notes that the leader's client has written. The caller holds mu.
func (l *lead) moved(now time.Time) {
	if l != nil && !l.busy {
		l.began = true
		l.store.wrote[l.whose] = now
	}
}

// grows notes where the unpack of ing reads, if it leads.
func (s *Store) grows(ing *ingest, g *Growing) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if l := ing.lead; l != nil {
		l.growing = g
	}
}

// lend lets followers read the data file that the ingest has now, if it leads.
func (s *Session) lend() error {
	l := s.store.leadOf(s.ing)
	if l == nil {
		return nil
	}
	f, err := os.Open(s.ing.path(dataFile))
	if err != nil {
		return err
	}
	s.store.mu.Lock()
	old := f
	if !l.over {
		old, l.file = l.file, f
	}
	s.store.mu.Unlock()
	closeUnused(old)
	return nil
}

// share is what a session does when no transfer brings its blob: it follows the
// client that fetches it, or becomes that client. t has the bytes of a transfer
// that failed, or is nil; why says what makes this necessary.
func (s *Session) share(ctx context.Context, t Transfer, why error) error {
	what := "no transfer, the client fetches"
	if t != nil {
		what = "the transfer failed, the client goes on"
	}
	var best, last *lead
	defer func() { s.store.leave(best) }()
	for {
		if there, err := s.adopt(last); there || err != nil {
			return err
		}
		l, mine, err := s.elect()
		if err != nil {
			return err
		}
		s.store.waiting(s.ing, l)
		if mine {
			s.tell(ctx, what, why)
			return s.begin(ctx, l, t, best)
		}
		if err := s.behind(ctx, l); err != nil {
			s.store.leave(l)
			return err
		}
		last, best = l, s.better(best, l)
		if l.err != nil {
			what, why = "the client that fetched the blob failed, another goes on", l.err
		}
	}
}

// tell says why the client has to fetch. Once for all who wait: the others follow.
func (s *Session) tell(ctx context.Context, what string, why error) {
	entry := log.G(ctx).WithError(why).WithField("digest", s.named).WithField("ref", s.ing.ref)
	if why == nil || errdefs.IsNotFound(why) {
		entry.Debug(what)
	} else {
		entry.Warn(what)
	}
}

// behind waits for the end of the leader's turn.
func (s *Session) behind(ctx context.Context, l *lead) error {
	log.G(ctx).WithField("digest", s.named).WithField("ref", s.ing.ref).WithField("leader", l.ing.ref).
		Debug("another client fetches the blob, this one waits for it")
	timer := time.NewTimer(s.store.overdue(l))
	defer timer.Stop()
	for {
		select {
		case <-l.ended:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-timer.C:
			timer.Reset(s.store.overdue(l))
		}
	}
}

// better chooses from which of two turns that are over to take bytes, and leaves
// the other. Bytes that made a blob wrong are taken from nobody any more.
func (s *Session) better(best, l *lead) *lead {
	if l.spoil {
		s.ing.alone = true
	}
	if best == nil || l.have > best.have {
		best, l = l, best
	}
	s.store.leave(l)
	return best
}

// adopt makes the blob that somebody has brought the staged blob of this ingest.
// Where namespaces do not share, only what a leader of the same one brought counts.
func (s *Session) adopt(last *lead) (bool, error) {
	if s.store.isolated && (last == nil || !last.done) {
		return false, nil
	}
	s.store.mu.Lock()
	b := s.store.blobs[s.named]
	there := b != nil && b.size == s.ing.total
	s.store.mu.Unlock()
	if !there {
		return false, nil
	}
	held, err := s.store.hold(s.ing, s.named)
	if !held || err != nil { // removed between the look and the hold
		return false, err
	}
	return true, s.adopted()
}

// adopted settles an ingest whose blob came into blobs/ by another way than its data.
func (s *Session) adopted() error {
	if err := errors.Join(s.closeData(), removeFile(s.ing.path(dataFile))); err != nil {
		return err
	}
	s.ing.digester = nil
	s.ing.rehash(s.algorithm())
	return s.settleFolder(s.named)
}

// begin takes over what failed transfers and leaders have, the longest first.
func (s *Session) begin(ctx context.Context, l *lead, t Transfer, best *lead) error {
	if _, err := s.data(); err != nil {
		return err
	}
	if err := s.lend(); err != nil {
		return err
	}
	var from []source
	if t != nil {
		from = append(from, t)
	}
	if best != nil {
		from = append(from, best)
	}
	if len(from) == 2 && from[1].Frontier() > from[0].Frontier() {
		from[0], from[1] = from[1], from[0]
	}
	for _, f := range from {
		l.promise(f.Frontier())
		if err := s.salvage(ctx, f); err != nil {
			return err
		}
	}
	return s.catchUp(ctx)
}

// volunteer makes a session that writes the leader, if there is none: whoever
// comes later need not fetch the same bytes.
func (s *Session) volunteer() error {
	if s.store.fetcher == nil || s.ing.total <= 0 || s.named == "" || s.named != s.want || s.store.led(s.key()) {
		return nil
	}
	l, mine, err := s.elect()
	if err != nil {
		return err
	}
	if !mine {
		s.store.leave(l)
		return nil
	}
	defer s.store.busy(s.ing, false)
	if _, err := s.data(); err != nil {
		return err
	}
	return s.lend()
}
