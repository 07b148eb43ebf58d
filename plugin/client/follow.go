package client

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	ctransfer "github.com/containerd/containerd/v2/core/transfer"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/status"
)

// What containerd's transfer service says of a blob that it need not fetch, and of one that it is at.
const (
	eventExists      = "already exists"
	eventDownloading = "downloading"
	eventComplete    = "complete"
	eventExtracting  = "extracting" // complete before
	eventExtracted   = "extracted"
	eventResolved    = "fetching image content"
)

// events are the last ones of containerd's, by blob.
type events map[digest.Digest]ctransfer.Progress

// following makes the state of a pull that containerd runs from three sources: its events say what the reference
// stands for and which layers it has already, its store holds the manifest, and gantryd tells the rest.
type following struct {
	pull   *Pull
	state  State // Layers are filled in by snapshot
	store  ccontent.Provider
	report func(context.Context) (*status.Report, error)
	layers []ocispec.Descriptor
	latest *status.Report
	seen   map[seenKey]seen

	mu     sync.Mutex // events come on a goroutine of their own
	events events
	loaded map[digest.Digest]bool // blobs that containerd reported bytes of
	image  ocispec.Descriptor
}

// seenKey is one transfer of gantryd's: a blob may have several, one after another.
type seenKey struct {
	blob    transfer.Blob
	started int64
}

// seen is how many bytes a transfer had fetched when the pull first saw it, and when it last did.
type seen struct {
	first, last int64
	whole       bool // all bytes were there
}

// event takes one of containerd's.
func (f *following) event(p ctransfer.Progress) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case p.Desc == nil:
	case p.Event == eventResolved:
		f.image = *p.Desc
	default:
		if p.Event == eventExtracted {
			p.Event = eventComplete
		}
		f.events[p.Desc.Digest] = p
		if p.Event == eventDownloading && p.Progress > 0 {
			f.loaded[p.Desc.Digest] = true
		}
	}
}

func (f *following) target(desc ocispec.Descriptor) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.image = desc
}

// resolved says whether the registry knows the reference.
func (f *following) resolved() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.image.Digest != ""
}

// until tells how far the pull is until it has ended, and returns how.
func (f *following) until(ctx context.Context, ended <-chan error) error {
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	f.pull.tell(f.state)
	for {
		select {
		case err := <-ended:
			return err
		case <-tick.C:
			if ctx.Err() == nil { // else nobody answers
				f.pull.tell(f.snapshot(ctx))
			}
		}
	}
}

// finish is the state after a pull that succeeded.
func (f *following) finish(ctx context.Context) (State, error) {
	if err := f.manifest(ctx); err != nil {
		return State{}, err
	}
	f.settle()
	s := f.snapshot(ctx)
	for i := range s.Layers {
		l := &s.Layers[i]
		l.Phase, l.Received, l.Rate, l.Error = PhaseDone, l.Size, 0, ""
		if l.Fetched == 0 && l.Seconds == (status.Seconds{}) {
			l.Phase = PhaseExists
		}
	}
	return s, nil
}

// failed tells how far a pull was that failed: most of it may have happened after the last look. It returns the layers.
func (f *following) failed(ctx context.Context, err error) []Layer {
	if ctx.Err() != nil {
		return nil
	}
	s := f.snapshot(ctx)
	s.Layers = noted(s.Layers, err)
	f.pull.tell(s)
	return s.Layers
}

// settle makes up for containerd's last events, which may be on their way when the pull has succeeded.
func (f *following) settle() {
	f.mu.Lock()
	defer f.mu.Unlock()
	for d, p := range f.events {
		if p.Event != eventExists {
			p.Event = eventComplete
			f.events[d] = p
		}
	}
}

// manifest reads the layers once containerd has stored the manifest.
func (f *following) manifest(ctx context.Context) error {
	f.mu.Lock()
	image := f.image
	f.mu.Unlock()
	f.state.Digest = image.Digest
	if f.layers != nil || image.Digest == "" {
		return nil
	}
	m, err := f.pull.manifest(ctx, f.store, image)
	if err != nil {
		return fmt.Errorf("read the manifest: %w", err)
	}
	f.layers = unique(m.Layers)
	return nil
}

// snapshot is the state now.
func (f *following) snapshot(ctx context.Context) State {
	ctx, cancel := context.WithTimeout(ctx, answerWithin)
	defer cancel()
	// Until the manifest is stored there is none to read; why a pull fails is told by the pull.
	_ = f.manifest(ctx)
	if r, err := f.report(ctx); err == nil {
		f.latest = r
	} else { // containerd's events go on alone
		for i := range f.latest.Transfers {
			f.latest.Transfers[i].Rate = 0
		}
	}
	f.mu.Lock()
	happened := maps.Clone(f.events)
	f.mu.Unlock()
	s := f.state
	s.Layers = make([]Layer, 0, len(f.layers))
	for _, desc := range f.layers {
		s.Layers = append(s.Layers, f.layer(desc, f.latest, happened[desc.Digest]))
	}
	return s
}

// layer tells of one layer.
func (f *following) layer(desc ocispec.Descriptor, r *status.Report, event ctransfer.Progress) Layer {
	l := Layer{Digest: desc.Digest, Size: desc.Size, Phase: PhaseWaiting}
	if event.Event == eventExists {
		l.Phase, l.Received = PhaseExists, l.Size
	}
	t, ok := f.transferOf(desc, r)
	if ok {
		l.transferred(t)
	} else if l.Phase == PhaseWaiting && f.wasWhole(desc) {
		l.Phase, l.Received = PhaseUnpacking, l.Size // gantryd is done with the transfer
	}
	if event.Event == eventDownloading && event.Progress > l.Received && l.Phase != PhaseExists {
		l.Phase, l.Received = PhaseFetching, event.Progress // by containerd, where gantry cannot
	}
	left := ok && t.Phase == string(transfer.PhaseFailed)
	if event.Event == eventExtracting && (left || !ok) {
		l.Phase, l.Received = PhaseUnpacking, l.Size
	}
	l.Fetched = f.fetched(desc)
	if i := slices.IndexFunc(r.Unpacks, func(u status.Unpack) bool { return u.Digest == desc.Digest && u.Size == desc.Size }); i >= 0 {
		u := r.Unpacks[i]
		l.Read, l.Written = u.Read, u.Written
		if l.Received == l.Size && l.Phase != PhaseVerifying {
			l.Phase = PhaseUnpacking
		}
	}
	if i := slices.IndexFunc(r.Recent, func(x status.Layer) bool { return x.Digest == desc.Digest && f.during(x.Started, x.Seconds.Total) }); i >= 0 {
		x := r.Recent[i]
		l.Phase, l.Read, l.Written, l.Seconds, l.Error = PhaseDone, x.Size, x.Written, x.Seconds, x.Error
		if x.Error == "" {
			l.Received = x.Size // its transfer may be told of no more
		} else {
			l.Phase = PhaseFailed
		}
		if !x.Started.Before(f.state.Started) {
			l.Fetched = max(l.Fetched, x.Fetched)
		}
	}
	if event.Event == eventComplete && l.Read == 0 && (l.Phase == PhaseUnpacking || left) {
		l.Phase, l.Error = PhaseDone, "" // gantryd has its layer file already
	}
	switch {
	case left && l.Phase == PhaseDone:
		l.Fetched += l.Size - t.Frontier // containerd fetched the rest
	case l.Fetched == 0 && l.Phase != PhaseExists && f.alone(desc):
		l.Fetched = l.Received
		if event.Event == eventComplete {
			l.Fetched = l.Size
		}
	}
	return l
}

// alone says whether containerd fetched a layer without gantryd, which knew no way.
func (f *following) alone(desc ocispec.Descriptor) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	for key := range f.seen {
		if key.blob.Digest == desc.Digest {
			return false
		}
	}
	return f.loaded[desc.Digest]
}

// during says whether something that took seconds from began on was there during this pull.
func (f *following) during(began time.Time, seconds float64) bool {
	return !began.Add(time.Duration(seconds * float64(time.Second))).Before(f.state.Started)
}

// transferOf finds the transfer of a layer that counts, and notes what it has fetched. Failed ones of the past are
// remembered by gantryd for a while.
func (f *following) transferOf(desc ocispec.Descriptor, r *status.Report) (found status.Transfer, ok bool) {
	b := transfer.Blob{Digest: desc.Digest, Size: desc.Size}
	for _, t := range r.Transfers {
		ours := !t.Started.Before(f.state.Started)
		if t.Digest != b.Digest || t.Size != b.Size || t.Phase == string(transfer.PhaseFailed) && !ours {
			continue
		}
		if !ok || t.Started.After(found.Started) {
			found, ok = t, true
		}
		key := seenKey{b, t.Started.UnixNano()}
		s, known := f.seen[key]
		if !known && !ours {
			s.first = t.Fetched
		}
		s.last, s.whole = max(s.last, t.Fetched), t.Received == t.Size
		f.seen[key] = s
	}
	return found, ok
}

// wasWhole says whether a transfer that gantryd tells of no more had all bytes.
func (f *following) wasWhole(desc ocispec.Descriptor) bool {
	for key, s := range f.seen {
		if s.whole && key.blob.Digest == desc.Digest && key.blob.Size == desc.Size {
			return true
		}
	}
	return false
}

// fetched is what gantryd fetched of a layer during this pull, as far as it was seen.
func (f *following) fetched(desc ocispec.Descriptor) int64 {
	var sum int64
	for key, s := range f.seen {
		if key.blob.Digest == desc.Digest && key.blob.Size == desc.Size {
			sum += max(0, s.last-s.first)
		}
	}
	return sum
}

// transferred takes over how far a transfer of gantryd's is.
func (l *Layer) transferred(t status.Transfer) {
	l.Received, l.Rate, l.Hosts, l.Error = t.Received, t.Rate, t.Hosts, t.Error
	switch transfer.Phase(t.Phase) {
	case transfer.PhaseLock:
		l.Phase = PhaseLock
	case transfer.PhaseFetching:
		l.Phase = PhaseFetching
	case transfer.PhaseVerifying:
		l.Phase = PhaseVerifying
	case transfer.PhaseComplete:
		if l.Phase != PhaseExists {
			l.Phase = PhaseUnpacking
		}
	}
}
