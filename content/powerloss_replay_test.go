package content_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/crashfs"
	"github.com/gantryd/gantry/integration/short"
)

// plug is pulled at a cut of the log.
type plug struct {
	dir    string // where states are saved
	log    crashfs.Log
	blobs  map[string]*pulled
	seen   map[string]bool
	states int
}

// How many random states there are for each fsync and answer, and at how many moments besides.
const (
	statesPerCut = 2
	cutsBetween  = 40
)

func replay(t *testing.T, p *plug) {
	t.Helper()
	const seed = 20
	r := rand.New(rand.NewPCG(seed, uint64(len(p.log))))
	cuts := append(p.log.Syncs(), p.log.Marked()...)
	for _, cut := range slices.Clone(cuts) {
		cuts = append(cuts, cut-1)
	}
	for range cutsBetween {
		cuts = append(cuts, r.IntN(len(p.log)+1))
	}
	slices.Sort(cuts)
	for i, cut := range slices.Compact(cuts) {
		if i%short.Size(1, 7) > 0 {
			continue
		}
		p.try(t, cut, "least", p.log.Least(cut))
		p.try(t, cut, "most", p.log.Most(cut))
		for i := range statesPerCut {
			p.try(t, cut, fmt.Sprintf("some(%d)", i), p.log.Some(cut, r))
		}
		if t.Failed() {
			return
		}
	}
	t.Logf("%d operations, %d fsyncs, %d answers: %d different states", len(p.log), len(p.log.Syncs()), len(p.log.Marked()), p.states)
}

// promised are the names of the blobs that clients were told of.
func (p *plug) promised(cut int) []string {
	var names []string
	for _, m := range p.log.Marks(cut) {
		what, name, _ := strings.Cut(m, " ")
		names = slices.DeleteFunc(names, func(have string) bool { return have == name })
		if what == "has" {
			names = append(names, name)
		}
	}
	return names
}

// try starts a node from a state.
func (p *plug) try(t *testing.T, cut int, how string, s *crashfs.State) {
	t.Helper()
	promised := p.promised(cut)
	key := fmt.Sprint(s.Sum(), promised)
	if p.seen[key] {
		return
	}
	p.seen[key] = true
	p.states++
	name := fmt.Sprintf("state-%d", p.states)
	if err := s.Save(filepath.Join(p.dir, name)); err != nil {
		t.Fatal(err)
	}
	n := newNode(filepath.Join(p.dir, name), p.blobs, func(string) {})
	if err := n.survives(namespaces.WithNamespace(t.Context(), "default"), promised); err != nil {
		t.Errorf("power lost after operation %d of %d (%s), %s: %v", cut, len(p.log), p.log.At(cut-1), how, err)
	}
	if err := os.RemoveAll(n.root); err != nil {
		t.Fatal(err)
	}
}

func (n *node) survives(ctx context.Context, promised []string) error {
	if err := n.start(time.Hour); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	for _, step := range []struct {
		what string
		do   func(context.Context) error
	}{
		{"what the store shows", n.truthful},
		{"what was promised", func(ctx context.Context) error { return n.has(ctx, promised...) }},
		{"transfers", n.resumes},
		{"pulls", n.pulls},
		{"what is left", n.clean},
	} {
		if err := step.do(ctx); err != nil {
			return errors.Join(fmt.Errorf("%s: %w", step.what, err), n.store.Close(), n.transfers.Close())
		}
	}
	return nil
}

// truthful: what lies in blobs/, or was discarded, is shown, and is what its name says.
func (n *node) truthful(ctx context.Context) error {
	shown := 0
	err := n.store.Walk(ctx, func(info ccontent.Info) error {
		shown++
		got, err := ccontent.ReadBlob(ctx, n.store, ocispec.Descriptor{Digest: info.Digest})
		if err != nil {
			return err
		}
		if d := info.Digest.Algorithm().FromBytes(got); d != info.Digest || int64(len(got)) != info.Size {
			return fmt.Errorf("%s of %d bytes has %d bytes of %s", info.Digest, info.Size, len(got), d)
		}
		return nil
	})
	files := 0
	errs := []error{err}
	for _, folder := range []string{"blobs", "discarded"} { // what is in both was found at the start
		errs = append(errs, filepath.WalkDir(filepath.Join(n.contentRoot(), folder), func(_ string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() {
				files++
			}
			return err
		}))
	}
	return errors.Join(append(errs, equal("files and records beside what is shown", files, shown))...)
}

func equal(what string, got, want int) error {
	if got != want {
		return fmt.Errorf("%s: %d, wanted %d", what, got, want)
	}
	return nil
}

func (n *node) has(ctx context.Context, names ...string) error {
	for _, name := range names {
		p := n.blobs[name]
		got, err := ccontent.ReadBlob(ctx, n.store, ocispec.Descriptor{Digest: p.digest})
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if !bytes.Equal(got, p.data) {
			return fmt.Errorf("%s has other bytes", name)
		}
	}
	return nil
}

// resumes: every transfer that is there in part completes, and no block that is not the blob's is taken for it:
// that would show in a second fetch.
func (n *node) resumes(ctx context.Context) error {
	for _, p := range n.blobs {
		if _, err := os.Stat(filepath.Join(n.transferRoot(), "sha256-"+p.digest.Encoded())); !p.hosted || err != nil {
			continue
		}
		h, err := n.transfers.Join(ctx, "", p.blob(), n.hosts[p.digest])
		if err != nil {
			return err
		}
		got, err := read(ctx, h.ReadAt)
		if err == nil {
			err = h.Wait(ctx)
		}
		if err := errors.Join(err, h.Close()); err != nil && !p.faulty {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		if !bytes.Equal(got, p.data) && !p.faulty {
			return fmt.Errorf("%s: other bytes were handed out", p.name)
		}
		if sent := n.hosts[p.digest].total(); sent > p.size() && !p.faulty {
			return fmt.Errorf("%s: %d of %d bytes were fetched", p.name, sent, p.size())
		}
	}
	return nil
}

func read(ctx context.Context, at func(context.Context, []byte, int64) (int, error)) ([]byte, error) {
	var got []byte
	buf := make([]byte, 1<<20)
	for {
		k, err := at(ctx, buf, int64(len(got)))
		got = append(got, buf[:k]...)
		if errors.Is(err, io.EOF) {
			return got, nil
		}
		if err != nil {
			return got, err
		}
	}
}

// pulls: every client gets its blob when it comes again. What was not safe may be garbage, in length and in bytes,
// and the digest shows it once: then the client starts over.
func (n *node) pulls(ctx context.Context) error {
	for _, p := range n.blobs {
		if _, err := n.store.Info(ctx, p.digest); err == nil {
			continue
		}
		err := n.pull(ctx, p)
		if errdefs.IsFailedPrecondition(err) {
			err = n.pull(ctx, p)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
		if err := n.has(ctx, p.name); err != nil {
			return err
		}
	}
	return n.truthful(ctx)
}

// clean: containerd's garbage collection and the sweep leave nothing.
func (n *node) clean(ctx context.Context) error {
	statuses, err := n.store.ListStatuses(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, s := range statuses {
		errs = append(errs, n.store.Abort(ctx, s.Ref))
	}
	var shown []digest.Digest
	errs = append(errs, n.store.Walk(ctx, func(info ccontent.Info) error {
		shown = append(shown, info.Digest)
		return nil
	}))
	for _, d := range shown {
		errs = append(errs, n.store.Delete(ctx, d))
	}
	errs = append(errs, n.store.Close(), n.transfers.Close())
	if err := errors.Join(append(errs, n.start(time.Nanosecond))...); err != nil {
		return err
	}
	errs = append(errs, n.transfers.Sweep(ctx))
	return errors.Join(append(errs, n.transfers.Close(), filepath.WalkDir(n.root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			err = fmt.Errorf("%s stays behind", path)
		}
		return err
	}))...)
}
