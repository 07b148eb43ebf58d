package plugin

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"

	ccontent "github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/restore"
)

// discardedStore has blobs that come back, or do not.
type discardedStore struct {
	blobs map[digest.Digest]error
	calls atomic.Int32
	hang  bool
}

func (s *discardedStore) DiscardedBlobs() (all []ccontent.Info) {
	for d := range s.blobs {
		all = append(all, ccontent.Info{Digest: d, Size: 10})
	}
	return all
}

func (s *discardedStore) Restore(ctx context.Context, d digest.Digest) error {
	s.calls.Add(1)
	if s.hang {
		<-ctx.Done()
		return context.Cause(ctx)
	}
	return s.blobs[d]
}

// restoring serves a store and returns a connection to it.
func restoring(t *testing.T, s discarded) *grpc.ClientConn {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	restore.Register(srv, restorer{s})
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = conn.Close()
		srv.Stop()
		<-done //nolint:errcheck // only its end counts
	})
	return conn
}

func TestRestoreGoesOnAfterAFailure(t *testing.T) {
	t.Parallel()
	s := &discardedStore{blobs: map[digest.Digest]error{}}
	for i := range 9 {
		s.blobs[digest.FromString(fmt.Sprint(i))] = nil
	}
	bad, deleted := digest.FromString("0"), digest.FromString("1")
	s.blobs[bad] = errors.New("the registry is away")
	s.blobs[deleted] = fmt.Errorf("deleted: %w", errdefs.ErrNotFound)
	var failed []digest.Digest
	var events []restore.Event
	if err := restore.Call(t.Context(), restoring(t, s), func(e restore.Event) error {
		events = append(events, e)
		if e.State == restore.Failed {
			failed = append(failed, e.Digest)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if first := events[0]; first.State != restore.Begun || first.Blobs != 9 || first.Bytes != 90 {
		t.Errorf("began with %+v", first)
	}
	if last := events[len(events)-1]; len(events) != 10 || last.Done != 9 || last.DoneBytes != 90 {
		t.Errorf("%d events, the last %+v", len(events), last)
	}
	if !slices.Equal(failed, []digest.Digest{bad}) {
		t.Errorf("failed: %v, want %s", failed, bad)
	}
}

func TestRestoreEndsWithItsClient(t *testing.T) {
	t.Parallel()
	s := &discardedStore{blobs: map[digest.Digest]error{digest.FromString("a"): nil}, hang: true}
	ctx, cancel := context.WithCancel(t.Context())
	err := restore.Call(ctx, restoring(t, s), func(restore.Event) error {
		cancel()
		return nil
	})
	if err == nil {
		t.Error("no error")
	}
}
