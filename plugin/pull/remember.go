package pull

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/content"
)

const (
	// rememberFor is how long a discarded blob is good for a retry of its pull: containerd deletes it when the pull failed
	// for another layer.
	rememberFor = time.Hour
	// maxRemembered bounds how many are remembered. A record has 32 bytes for each MiB of its blob.
	maxRemembered = 256
)

// remembered are the records of blobs that were discarded lately, the oldest first.
type remembered struct {
	mu   sync.Mutex
	list []discardedLately
}

type discardedLately struct {
	key    unpackKey
	record *content.Record
	until  time.Time
}

func (r *remembered) add(key unpackKey, record *content.Record) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.drop(key)
	if len(r.list) == maxRemembered {
		r.list = append(r.list[:0], r.list[1:]...)
	}
	r.list = append(r.list, discardedLately{key, record, time.Now().Add(rememberFor)})
}

func (r *remembered) get(key unpackKey) *content.Record {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.list {
		if m.key == key && time.Now().Before(m.until) {
			return m.record
		}
	}
	return nil
}

// drop forgets a blob. Called with mu held.
func (r *remembered) drop(key unpackKey) {
	for i, m := range r.list {
		if m.key == key {
			r.list = append(r.list[:i], r.list[i+1:]...)
			return
		}
	}
}

// again answers for a layer that was discarded in an earlier try of its pull: the layer file is there, and the record is
// all that is needed.
func (p *Puller) again(req content.FetchRequest) (content.Transfer, bool) {
	if !p.discard {
		return nil, false
	}
	record := p.remembered.get(p.unpackKey(req.Namespace, req.Digest, req.Size))
	if record == nil {
		return nil, false
	}
	id, err := p.layers.Lookup(req.Digest)
	if err != nil {
		return nil, false
	}
	p.layers.Want(id)
	return recordOnly{record}, true
}

// recordOnly is a content.Transfer of which only the record is left.
type recordOnly struct{ record *content.Record }

var _ content.Discarding = recordOnly{}

func (r recordOnly) Record() *content.Record  { return r.record }
func (recordOnly) Wait(context.Context) error { return nil }
func (r recordOnly) Frontier() int64          { return r.record.Size }
func (recordOnly) Close() error               { return nil }
func (r recordOnly) LinkTo(path string) error {
	return fmt.Errorf("blob %s was discarded, link %s: %w", r.record.Digest, path, errdefs.ErrFailedPrecondition)
}
func (recordOnly) CloneTo(context.Context, *os.File, int64) (int64, error) { return 0, nil }
