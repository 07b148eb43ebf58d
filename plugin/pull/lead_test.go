package pull

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/content"
)

// followerClient is one client whose second STAT waits.
type followerClient struct {
	ns      string
	session *content.Session
	status  chan error
}

func (c *followerClient) ctx(t *testing.T) context.Context {
	t.Helper()
	return namespaces.WithNamespace(t.Context(), c.ns)
}

// clients opens a session in each of n namespaces.
func (f *fixture) clients(t *testing.T, n int, l ocispec.Descriptor) (all []*followerClient) {
	t.Helper()
	for i := range n {
		ns := fmt.Sprint("ns", i)
		c := &followerClient{ns: ns, status: make(chan error, 1)}
		ctx := c.ctx(t)
		var err error
		if c.session, err = f.store.Open(ctx, ns+"/1/layer-"+l.Digest.String(), l.Size, ""); err != nil {
			t.Fatal(err)
		}
		go func() {
			_, err := c.session.Status(ctx)
			c.status <- err
		}()
		all = append(all, c)
	}
	return all
}

// next waits for the client that is to fetch, and takes it out of those that wait.
func next(t *testing.T, all []*followerClient) (leader *followerClient, rest []*followerClient) {
	t.Helper()
	eventually(t, "a client to go on", func() bool {
		for i, c := range all {
			select {
			case err := <-c.status:
				if err != nil {
					t.Fatal(err)
				}
				leader, rest = c, append(append(rest, all[:i]...), all[i+1:]...)
				return true
			default:
			}
		}
		return false
	})
	return leader, rest
}

// The registry refuses the rest of a layer. One client goes on and leaves, another
// goes on from there: the unpack follows both, and all the others find the layer.
func TestUnpackFollowsTheLeaders(t *testing.T) {
	t.Parallel()
	f := newFixture(t, false)
	l, id := f.addLayer(t, 1, 4<<20)
	f.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if firstByte(t, r) < 1<<20 {
			return false
		}
		w.WriteHeader(http.StatusForbidden)
		return true
	}
	m := f.addImage(t, "ns0", []ocispec.Descriptor{l}, []digest.Digest{id})
	for i := 1; i < 5; i++ {
		f.pulled(fmt.Sprint("ns", i), m, "127.0.0.1", "test/image")
		f.prepare(fmt.Sprint("ns", i), m, f.host()+"/test/image:latest")
	}
	f.Start(t.Context(), f.images)
	data := f.blobs[l.Digest]
	first, rest := next(t, f.clients(t, 5, l))
	from := first.session.Stat().Offset
	if from == 0 || from > 1<<20 {
		t.Fatalf("want a partial takeover, got %d bytes", from)
	}
	half := (from + l.Size) / 2
	if _, err := first.session.Write(first.ctx(t), 0, data[from:half]); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the others to follow", func() bool {
		list, err := f.store.ListStatuses(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return !slices.ContainsFunc(list, func(s content.Status) bool { return s.Offset != half })
	})
	if err := first.session.Close(); err != nil {
		t.Fatal(err)
	}
	second, rest := next(t, rest)
	if got := second.session.Stat().Offset; got != half {
		t.Errorf("want the second client to go on from %d, got %d", half, got)
	}
	count, err := second.session.Write(second.ctx(t), 0, data[half:])
	if err != nil {
		t.Fatal(err)
	}
	if _, err := second.session.Commit(second.ctx(t), count, l.Size, l.Digest, nil); err != nil {
		t.Fatal(err)
	}
	f.commit(l.Digest)
	var wg sync.WaitGroup
	for _, c := range rest {
		wg.Go(func() {
			if err := <-c.status; err != nil || c.session.Stat().Offset != l.Size {
				t.Errorf("want a follower to have all, got %+v, %v", c.session.Stat(), err)
			}
			if _, err := c.session.Commit(c.ctx(t), 0, l.Size, l.Digest, nil); !errdefs.IsAlreadyExists(err) {
				t.Errorf("want the commit of what is there to say so, got %v", err)
			}
			if got, _, err := f.Layer(c.ctx(t), l); err != nil || got != id {
				t.Errorf("want %s, got %s, %v", id, got, err)
			}
		})
	}
	wg.Wait()
	if got, _, err := f.Layer(second.ctx(t), l); err != nil || got != id {
		t.Errorf("want %s, got %s, %v", id, got, err)
	}
	if n := len(f.Recent()); n != 1 || f.Recent()[0].Error != "" {
		t.Errorf("want one unpack, got %+v", f.Recent())
	}
}
