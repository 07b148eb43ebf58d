package pull

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"

	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/plugin/status"
)

// The phases of an unpack, in order.
const (
	phaseQueued    = "queued"    // waits for a worker
	phaseUnpacking = "unpacking" // decompresses and writes while bytes arrive
	phaseVerifying = "verifying" // waits until the blob's digest is known good
)

// maxRecent is how many finished layers are remembered.
const maxRecent = 256

// times are where the time of one unpack went, in nanoseconds.
type times struct {
	queued, verify atomic.Int64
}

func since(began time.Time, into *atomic.Int64) { into.Add(int64(time.Since(began))) }

// recent is the ring of finished layers, the oldest first.
type recent struct {
	mu     sync.Mutex
	layers []finished
}

type finished struct {
	status.Layer
	snapshot string // the first that adopted it
}

func (r *recent) add(l status.Layer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.layers = append(r.layers, finished{Layer: l})
	if len(r.layers) > maxRecent {
		r.layers = slices.Delete(r.layers, 0, len(r.layers)-maxRecent)
	}
}

// adopted adds what a snapshot took to show the layer. Those that adopt it after
// the first find it done.
func (r *recent) adopted(snapshot string, diffID digest.Digest, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range slices.Backward(r.layers) {
		l := &r.layers[i]
		if l.DiffID != diffID {
			continue
		}
		if l.snapshot == "" {
			l.snapshot = snapshot
		}
		if l.snapshot == snapshot {
			l.Seconds.Index += took.Seconds()
			if l.TailSeconds > 0 {
				l.TailSeconds += took.Seconds()
			}
		}
		return
	}
}

// Unpacks returns the unpacks under way, the oldest first.
func (p *Puller) Unpacks() []status.Unpack {
	p.mu.Lock()
	running := make([]*unpack, 0, len(p.unpacks))
	for _, u := range p.unpacks {
		running = append(running, u)
	}
	p.mu.Unlock()
	all := make([]status.Unpack, 0, len(running))
	for _, u := range running {
		s := status.Unpack{
			Digest: u.key.blob, Size: u.key.size, Read: u.read.Load(), Written: u.written.Load(),
			Phase: u.phase.Load().(string), Started: u.started,
		}
		s.Rate = float64(s.Written) / max(time.Since(u.started).Seconds(), 1e-3)
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b status.Unpack) int { return a.Started.Compare(b.Started) })
	return all
}

// Recent returns the layers that finished last, the newest first.
func (p *Puller) Recent() []status.Layer {
	p.recent.mu.Lock()
	defer p.recent.mu.Unlock()
	all := make([]status.Layer, 0, len(p.recent.layers)) // never null in JSON
	for _, l := range slices.Backward(p.recent.layers) {
		all = append(all, l.Layer)
	}
	return all
}

// imageOf returns an image reference that the blob is a layer of; empty if no
// snapshot label named one.
func (p *Puller) imageOf(key unpackKey) string {
	for _, m := range p.catalog.listing(key.blob, key.size) {
		if ref := p.hints.anyRef(key.namespace, m.digest); ref != "" {
			return ref
		}
	}
	return ""
}

// finished sums up an unpack that ended. A transfer among its sources tells how
// the download went.
func (p *Puller) finished(u *unpack, sources []byteSource) status.Layer {
	starved, decoding := u.clock.spent()
	l := status.Layer{
		Namespace: u.key.namespace, Image: p.imageOf(u.key),
		Digest: u.key.blob, Size: u.key.size, Started: u.started,
		Seconds: status.Seconds{
			Total:      u.ended.Sub(u.started).Seconds(),
			Queued:     time.Duration(u.times.queued.Load()).Seconds(),
			Starved:    starved.Seconds(),
			Decompress: decoding.Seconds(),
			Verify:     time.Duration(u.times.verify.Load()).Seconds(),
		},
	}
	var arrived time.Time // the last byte
	for _, s := range sources {
		if t, ok := s.(transferSource); ok {
			l.Fetched = t.Fetched()
			wait, download, verify := t.Timings()
			l.Seconds.Wait, l.Seconds.Download = wait.Seconds(), download.Seconds()
			l.Seconds.Verify = max(l.Seconds.Verify, verify.Seconds())
			arrived = t.Started().Add(wait + download)
		}
	}
	if u.err != nil {
		l.Error = u.err.Error()
		return l
	}
	l.DiffID, l.Written = u.layer.DiffID, u.layer.Size
	if !arrived.IsZero() {
		if arrived.Before(u.started) { // it was all there
			arrived = u.started
		}
		l.TailSeconds = u.ended.Sub(arrived).Seconds()
	}
	l.Seconds.Write, l.Seconds.Commit = u.layer.Timings.Write.Seconds(), u.layer.Timings.Sync.Seconds()
	return l
}
