package content_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/integration/crashfs"
)

// pulled is one blob of the work during which the power fails, and how a client asks for it.
type pulled struct {
	name     string
	data     []byte
	digest   digest.Digest
	ref      string
	declared int64 // 0: the client states no size
	hosted   bool  // a transfer can bring it
	discard  bool  // the transfer does not keep its bytes
	faulty   bool  // its host once sends wrong bytes: what is there after that may have to be fetched again
}

func (p *pulled) size() int64 { return int64(len(p.data)) }

func (p *pulled) blob() transfer.Blob { return transfer.Blob{Digest: p.digest, Size: p.size()} }

// The sizes are not whole blocks, so that each file ends in a torn one.
func thePulled() map[string]*pulled {
	all := map[string]*pulled{}
	add := func(name string, size int, alg digest.Algorithm, p pulled) {
		p.name, p.data = name, make([]byte, size)
		_, _ = rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%-32s", name)))).Read(p.data)
		p.digest = alg.FromBytes(p.data)
		p.ref = "default/1/layer-" + p.digest.String()
		p.declared = p.size()
		if name == "import" {
			p.ref, p.declared = "default/1/import-stream", 0
		}
		all[name] = &p
	}
	add("taken", 600_001, digest.SHA256, pulled{hosted: true})
	add("written", 300_001, digest.SHA256, pulled{})
	add("import", 100_001, digest.SHA256, pulled{})
	add("strong", 50_001, digest.SHA512, pulled{})
	add("stronger", 30_001, digest.SHA512, pulled{})
	add("broken", 700_001, digest.SHA256, pulled{hosted: true})
	add("paused", 900_001, digest.SHA256, pulled{hosted: true})
	add("lied", 300_001, digest.SHA256, pulled{hosted: true, faulty: true})
	add("left", 600_001, digest.SHA256, pulled{hosted: true})
	add("half", 200_001, digest.SHA256, pulled{})
	add("discarded", 1_300_001, digest.SHA256, pulled{hosted: true, discard: true})
	add("returned", 400_001, digest.SHA256, pulled{hosted: true, discard: true})
	return all
}

// host serves one blob.
type host struct {
	data []byte

	mu    sync.Mutex
	limit int64         // bytes after which it has nothing any more, or waits; 0: none
	stuck chan struct{} // closed when the limit is reached: from then on it waits
	flip  bool          // the first reply has a wrong byte
	sent  int64
}

func (h *host) Host() string { return "registry.test" }

func (h *host) Tier() int { return 0 }

func (h *host) Open(ctx context.Context, off, n int64) (transfer.Body, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.data[off : off+n]
	if h.limit > 0 {
		room := max(h.limit-h.sent, 0)
		switch {
		case room == 0 && h.stuck == nil:
			return transfer.Body{}, fmt.Errorf("gone: %w", errdefs.ErrNotFound)
		case room == 0:
			return transfer.Body{ReadCloser: io.NopCloser(waiting{ctx}), Off: off, N: n}, nil
		}
		p = p[:min(int64(len(p)), room)]
		if h.stuck != nil && h.sent+int64(len(p)) == h.limit {
			close(h.stuck)
		}
	}
	h.sent += int64(len(p))
	if h.flip {
		h.flip = false
		p = bytes.Clone(p)
		p[len(p)/3] ^= 1
	}
	return transfer.Body{ReadCloser: io.NopCloser(bytes.NewReader(p)), Off: off, N: n}, nil
}

func (h *host) total() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sent
}

// waiting is a body of which nothing comes.
type waiting struct {
	ctx context.Context //nolint:containedctx // as the body of an HTTP response
}

func (w waiting) Read([]byte) (int, error) {
	<-w.ctx.Done()
	return 0, context.Cause(w.ctx)
}

// node is a store with its transfers on one disk, as gantryd has them.
type node struct {
	root      string
	blobs     map[string]*pulled
	hosts     map[digest.Digest]*host
	mark      func(string)
	transfers *transfer.Manager
	store     *content.Store
}

func newNode(root string, blobs map[string]*pulled, mark func(string)) *node {
	n := &node{root: root, blobs: blobs, hosts: map[digest.Digest]*host{}, mark: mark}
	for _, p := range blobs {
		if p.hosted {
			n.hosts[p.digest] = &host{data: p.data}
		}
	}
	return n
}

func (n *node) contentRoot() string  { return filepath.Join(n.root, "content") }
func (n *node) transferRoot() string { return filepath.Join(n.root, "transfer") }

func (n *node) start(keep time.Duration) (err error) {
	if n.transfers, err = transfer.New(n.transferRoot(), transfer.Options{KeepPartial: keep, Grace: time.Nanosecond}); err != nil {
		return err
	}
	n.store, err = content.NewStore(n.contentRoot(), content.Options{Fetcher: n, Refetcher: n})
	return err
}

// Fetch joins the transfer as the daemon does.
func (n *node) Fetch(ctx context.Context, req content.FetchRequest) (content.Transfer, error) {
	h := n.hosts[req.Digest]
	if h == nil {
		return nil, fmt.Errorf("no host: %w", errdefs.ErrNotFound)
	}
	b := transfer.Blob{Digest: req.Digest, Size: req.Size}
	for _, p := range n.blobs {
		if p.digest == req.Digest && p.discard {
			d, err := n.transfers.JoinDiscarding(ctx, "", b, h)
			return &discardingTransfer{Handle: d}, err
		}
	}
	return n.transfers.Join(ctx, "", b, h)
}

// pull is a client that wants a blob: it fetches what is missing after the STAT that may wait, and commits.
func (n *node) pull(ctx context.Context, p *pulled) error {
	s, count, err := n.begin(ctx, p)
	if err != nil {
		return err
	}
	defer func() { _ = s.Close() }()
	if count, err = n.write(ctx, s, p, count, p.size()); err != nil {
		return err
	}
	if _, err = s.Commit(ctx, count, p.size(), p.digest, nil); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	n.mark("has " + p.name)
	return nil
}

// begin opens a session and lets it wait. count is the client's own.
func (n *node) begin(ctx context.Context, p *pulled) (*content.Session, int64, error) {
	s, err := n.store.Open(ctx, p.ref, p.declared, "")
	if err != nil {
		return nil, 0, err
	}
	count := s.Stat().Offset
	st, err := s.Status(ctx)
	if err != nil {
		return nil, 0, errors.Join(err, s.Close())
	}
	if p.declared > 0 && st.Offset == p.declared {
		n.mark("has " + p.name)
	}
	return s, count, nil
}

// write brings an ingest to end.
func (n *node) write(ctx context.Context, s *content.Session, p *pulled, count, end int64) (_ int64, err error) {
	for off := s.Stat().Offset; off < end; off = s.Stat().Offset {
		if count, err = s.Write(ctx, count, p.data[off:min(off+90_000, end)]); err != nil {
			return count, err
		}
		if off = s.Stat().Offset; off == p.declared {
			n.mark("has " + p.name)
		}
	}
	return count, nil
}

// The work, in steps that do not depend on each other.
func (n *node) steps() map[string]func(context.Context) error {
	simple := func(name string) func(context.Context) error {
		return func(ctx context.Context) error { return n.pull(ctx, n.blobs[name]) }
	}
	return map[string]func(context.Context) error{
		"taken":     simple("taken"),
		"written":   simple("written"),
		"import":    simple("import"),
		"strong":    simple("strong"),
		"stronger":  simple("stronger"),
		"discarded": simple("discarded"),
		"returned":  func(ctx context.Context) error { return n.returns(ctx, n.blobs["returned"]) },
		"broken": func(ctx context.Context) error {
			n.hosts[n.blobs["broken"].digest].limit = 560_000 // the client goes on
			return n.pull(ctx, n.blobs["broken"])
		},
		"lied": func(ctx context.Context) error {
			n.hosts[n.blobs["lied"].digest].flip = true
			return n.pull(ctx, n.blobs["lied"])
		},
		"half": func(ctx context.Context) error { // the client leaves
			s, count, err := n.begin(ctx, n.blobs["half"])
			if err == nil {
				_, err = n.write(ctx, s, n.blobs["half"], count, 150_000)
				err = errors.Join(err, s.Close())
			}
			return err
		},
		"paused": func(ctx context.Context) error { return n.interrupted(ctx, n.blobs["paused"], 500_000) },
		"left":   func(ctx context.Context) error { return n.interrupted(ctx, n.blobs["left"], 300_000) },
	}
}

// interrupted ends a transfer in the middle.
func (n *node) interrupted(ctx context.Context, p *pulled, at int64) error {
	h := n.hosts[p.digest]
	h.limit, h.stuck = at, make(chan struct{})
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := errors.New("the client left")
	go func() {
		<-h.stuck
		cancel(stop)
	}()
	s, _, err := n.begin(ctx, p)
	if err == nil {
		return errors.Join(fmt.Errorf("%s: not interrupted", p.name), s.Close())
	}
	if !errors.Is(err, stop) {
		return err
	}
	return nil
}

// work does it all, in order or at once, restarts, and does the rest.
func (n *node) work(ctx context.Context, atOnce bool) error {
	ctx = namespaces.WithNamespace(ctx, "default")
	if err := n.start(time.Hour); err != nil {
		return err
	}
	g, gctx := errgroup.WithContext(ctx)
	if !atOnce {
		g.SetLimit(1)
	}
	steps := n.steps()
	for _, name := range slices.Sorted(maps.Keys(steps)) {
		g.Go(func() error { return steps[name](gctx) })
	}
	if err := errors.Join(g.Wait(), n.store.Close(), n.transfers.Close()); err != nil {
		return err
	}
	if err := n.start(time.Nanosecond); err != nil {
		return err
	}
	paused, taken, broken, discarded := n.blobs["paused"], n.blobs["taken"], n.blobs["broken"], n.blobs["discarded"]
	n.hosts[paused.digest] = &host{data: paused.data}
	if err := n.pull(ctx, paused); err != nil {
		return err
	}
	n.mark("gone " + taken.name)
	if err := errors.Join(n.store.Delete(ctx, taken.digest), n.transfers.Forget(taken.digest)); err != nil {
		return err
	}
	n.mark("gone " + discarded.name)
	if err := n.store.Delete(ctx, discarded.digest); err != nil {
		return err
	}
	n.hosts[taken.digest] = &host{data: taken.data}
	if err := errors.Join(n.pull(ctx, taken), n.transfers.Forget(broken.digest)); err != nil {
		return err
	}
	return errors.Join(n.store.Close(), n.transfers.Close())
}

// The power fails after every fsync, around every answer and at moments between. Whatever of the rest had reached the
// disk: each blob that the store shows has its digest, each that was promised is there, every transfer and every
// ingest goes on to the right bytes, and nothing stays behind that nobody removes.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	if !crashfs.Alone(t) {
		return
	}
	if err := log.SetLevel("error"); err != nil { // every state has its warnings
		t.Fatal(err)
	}
	for name, atOnce := range map[string]bool{"in order": false, "at once": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, states := t.TempDir(), t.TempDir()
			fsys, err := crashfs.Mount(dir)
			if err != nil {
				t.Fatal(err)
			}
			closing(t, fsys.Close)
			unmount, err := crashfs.Memory(states)
			if err != nil {
				t.Fatal(err)
			}
			closing(t, unmount)
			blobs := thePulled()
			n := newNode(dir, blobs, fsys.Mark)
			if err := n.work(t.Context(), atOnce); err != nil {
				t.Fatal(err)
			}
			replay(t, &plug{dir: states, log: fsys.Log(), blobs: blobs, seen: map[string]bool{}})
		})
	}
}

func closing(t *testing.T, end func() error) {
	t.Helper()
	t.Cleanup(func() {
		if err := end(); err != nil {
			t.Error(err)
		}
	})
}
