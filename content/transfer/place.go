package transfer

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// maxPrivate bounds the folders beside the main one. Each further one needs a process that is stuck.
	maxPrivate = 16
	// refusal is for how long a finished folder that could not be locked is not tried again.
	refusal = 10 * time.Second
)

// privateName is the nth folder beside the main one, for those whose holder of the main one is stuck.
func privateName(b Blob, n int) string {
	return sizedName(b) + "." + strconv.Itoa(n)
}

// places is what a job knows of the folders that its blob may be in.
type places struct {
	root string
	blob Blob

	// Used only while the job waits.
	vigils    map[string]*vigil
	following string // was announced in the log
	tail      *tail

	mu      sync.Mutex
	refused map[string]refused
}

// refused is a finished folder that is not adopted; for good, as a wrong one, if until is zero.
type refused struct {
	data  os.FileInfo
	until time.Time
}

func newPlaces(root string, b Blob) *places {
	return &places{root: root, blob: b, vigils: map[string]*vigil{}, refused: map[string]refused{}}
}

// names lists the folders: the main one, there or not, and others that somebody has made: private ones, and the one
// that was the main one while another size had that name.
func (p *places) names() []string {
	main, sized := folderName(p.root, p.blob), sizedName(p.blob)
	names := []string{main}
	if sized != main && p.made(sized) {
		names = append(names, sized)
	}
	for n := range maxPrivate {
		if name := privateName(p.blob, n+1); p.made(name) {
			names = append(names, name)
		}
	}
	return names
}

func (p *places) made(name string) bool {
	_, folder := os.Lstat(folderPath(p.root, name))
	_, lock := os.Lstat(lockPath(p.root, name))
	return folder == nil || lock == nil
}

// finished finds a folder that claims to hold all of the blob, other than except.
func (p *places) finished(except string) string {
	for _, name := range p.names() {
		if name != except && p.complete(name) {
			return name
		}
	}
	return ""
}

func (p *places) complete(name string) bool {
	st, err := os.Lstat(filepath.Join(p.root, name, dataName))
	if err != nil || !peekComplete(p.root, name, p.blob) {
		return false
	}
	r, ok := p.refusal(name)
	return !ok || !os.SameFile(st, r.data) || !r.until.IsZero() && time.Now().After(r.until)
}

// refuse does not look at a finished folder for a while, or never again as long as its data is this file.
func (p *places) refuse(name string, d time.Duration) {
	st, err := os.Lstat(filepath.Join(p.root, name, dataName))
	if err != nil {
		return
	}
	r := refused{data: st}
	if d > 0 {
		r.until = time.Now().Add(d)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.refused[name] = r
}

func (p *places) refusal(name string) (refused, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r, ok := p.refused[name]
	return r, ok
}

func (p *places) isRefused(name string) bool {
	_, ok := p.refusal(name)
	return ok && !p.complete(name)
}

// stuck reports whether a folder's holder has made no progress for giveUp. grace is what it gets at least.
func (p *places) stuck(name string, giveUp, grace time.Duration) bool {
	v := p.vigils[name]
	if v == nil {
		v = &vigil{}
		p.vigils[name] = v
	}
	return v.idle(p.root, name, giveUp-min(giveUp, grace)) >= giveUp
}

// survey decides where to go on: in a finished folder, else behind somebody who makes progress, else in a free folder.
// If everybody is stuck, the first private folder that nobody has is taken, which needs a source of one's own.
func (j *job) survey() (hold *holding, follow string, err error) {
	var free []*holding
	defer func() {
		for _, h := range free {
			if h != hold {
				err = errors.Join(err, h.lock.Close())
			}
		}
	}()
	names := j.places.names()
	for _, name := range names {
		if j.places.complete(name) {
			if hold, err = tryShared(j.root, name); hold != nil || err != nil {
				return hold, "", err
			}
		}
	}
	var stuck []string
	for _, name := range names {
		h, err := j.take(name)
		switch {
		case err != nil:
			return nil, "", err
		case h != nil:
			delete(j.places.vigils, name)
			free = append(free, h)
		case !j.idles(name):
			if follow == "" || j.places.vigils[name].sign().After(j.places.vigils[follow].sign()) {
				follow = name
			}
		default:
			stuck = append(stuck, name)
		}
	}
	switch {
	case follow != "":
		return nil, follow, nil
	case len(stuck) > 0 && !j.hasSource():
		return nil, "", fmt.Errorf("another process holds %s and made no progress for %s: %w",
			lockPath(j.root, stuck[0]), j.opts.GiveUp, errdefs.ErrUnavailable)
	case len(free) > 0:
		hold = j.fullest(free)
		return hold, "", nil
	}
	return j.private()
}

// take locks a folder to work in it; nil if somebody else has it.
func (j *job) take(name string) (*holding, error) {
	h, err := tryExclusive(j.root, name)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if h != nil && name == plainName(j.blob) && folderName(j.root, j.blob) != name {
		// Taken by the other size between the look and the lock.
		return nil, h.lock.Close()
	}
	return h, nil
}

func (j *job) idles(name string) bool {
	return j.places.stuck(name, j.opts.GiveUp, j.opts.FirstContact)
}

// private takes a private folder of its own, or follows whoever was faster.
func (j *job) private() (*holding, string, error) {
	for n := range maxPrivate {
		name := privateName(j.blob, n+1)
		h, err := tryExclusive(j.root, name)
		if h != nil || err != nil {
			return h, "", err
		}
		if !j.idles(name) {
			return nil, name, nil
		}
	}
	return nil, "", fmt.Errorf("%d processes that hold the blob make no progress: %w", maxPrivate, errdefs.ErrUnavailable)
}

// fullest chooses the folder with the most recorded bytes, the first among equals.
func (j *job) fullest(free []*holding) *holding {
	best, most := free[0], int64(-1)
	if len(free) == 1 {
		return best
	}
	for _, h := range free {
		log, err := peekState(filepath.Join(j.root, h.name, stateName))
		if err != nil || log.size != j.blob.Size {
			continue
		}
		if n, _ := log.progress(); cmp.Compare(n, most) > 0 {
			best, most = h, n
		}
	}
	return best
}

func (j *job) hasSource() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	for _, s := range j.sources {
		if j.usable(s) {
			return true
		}
	}
	return false
}
