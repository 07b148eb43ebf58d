package content

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// client pulls one blob as containerd does: two STATs, WRITEs from where the second
// one says, COMMIT.
type client struct {
	namespace string
	data      []byte // what it writes
	d         digest.Digest
	session   *Session
	base      int64         // what the first STAT said
	status    chan error    // what the second one said
	gate      chan struct{} // closed before the first WRITE
	wrote     atomic.Int64
	ended     chan error
}

func (c *client) ref() string { return c.namespace + "/1/layer-" + c.d.String() }

func newClient(namespace string, data []byte, d digest.Digest) *client {
	return &client{
		namespace: namespace, data: data, d: d,
		status: make(chan error, 1), gate: make(chan struct{}), ended: make(chan error, 1),
	}
}

func (c *client) context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, c.namespace)
}

// start opens the session and lets the second STAT wait.
func (c *client) start(t *testing.T, s *Store) *client {
	t.Helper()
	ctx := c.context(t.Context())
	var err error
	c.session, err = s.Open(ctx, c.ref(), int64(len(c.data)), "")
	if err != nil {
		t.Fatal(err)
	}
	c.base = c.session.Stat().Offset
	go func() {
		_, err := c.session.Status(ctx)
		c.status <- err
	}()
	return c
}

// leads says whether the second STAT was answered, so that the client goes on.
func (c *client) leads(t *testing.T) bool {
	t.Helper()
	select {
	case err := <-c.status:
		if err != nil {
			t.Fatalf("%s: %v", c.namespace, err)
		}
		return true
	default:
		return false
	}
}

// write writes up to n bytes.
func (c *client) write(ctx context.Context, n int64) error {
	off := c.session.Stat().Offset
	end := min(off+n, int64(len(c.data)))
	_, err := c.session.Write(ctx, c.base+c.wrote.Load(), c.data[off:end])
	c.wrote.Add(c.session.Stat().Offset - off)
	return err
}

// finish writes the rest and commits.
func (c *client) finish(ctx context.Context) error {
	ctx = c.context(ctx)
	size := int64(len(c.data))
	for c.session.Stat().Offset < size {
		if err := c.write(ctx, 701); err != nil {
			return errors.Join(err, c.session.Close())
		}
	}
	off := c.base + c.wrote.Load()
	if c.wrote.Load() == 0 {
		off = 0 // a remote writer that wrote nothing
	}
	_, err := c.session.Commit(ctx, off, size, c.d, nil)
	if errdefs.IsAlreadyExists(err) {
		err = nil
	}
	return errors.Join(err, c.session.Close())
}

// run waits for the second STAT and does the rest.
func (c *client) run(ctx context.Context) {
	if err := <-c.status; err != nil {
		c.ended <- errors.Join(err, c.session.Close())
		return
	}
	<-c.gate
	c.ended <- c.finish(ctx)
}

// answered returns the one client whose STAT was answered.
func answered(t *testing.T, clients []*client) *client {
	t.Helper()
	synctest.Wait()
	var leader *client
	for _, c := range clients {
		if c.leads(t) {
			if leader != nil {
				t.Fatal("two clients are to fetch the blob")
			}
			leader = c
		}
	}
	if leader == nil {
		t.Fatal("no client is to fetch the blob")
	}
	return leader
}

func without(clients []*client, c *client) []*client {
	return slices.DeleteFunc(slices.Clone(clients), func(o *client) bool { return o == c })
}

// goOn has all clients finish and returns what they wrote together.
func goOn(t *testing.T, clients []*client) (wrote int64) {
	t.Helper()
	for _, c := range clients {
		close(c.gate)
		go c.run(t.Context())
	}
	for _, c := range clients {
		if err := <-c.ended; err != nil {
			t.Errorf("%s: %v", c.namespace, err)
		}
		wrote += c.wrote.Load()
	}
	return wrote
}

func five(data []byte, d digest.Digest) (clients []*client) {
	for i := range 5 {
		clients = append(clients, newClient(fmt.Sprint("ns", i), data, d))
	}
	return clients
}

// wantNothingLeft: no turn, no open file.
func wantNothingLeft(t *testing.T, s *Store) {
	t.Helper()
	wantNoIngests(t, s)
	if n := len(s.leads); n != 0 {
		t.Errorf("%d clients lead, wanted none", n)
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if path, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && strings.HasPrefix(path, s.root+"/") {
			t.Errorf("%s is still open", path)
		}
	}
}
