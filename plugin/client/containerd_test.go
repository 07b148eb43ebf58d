package client

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	ctransfer "github.com/containerd/containerd/v2/core/transfer"
	digest "github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/status"
)

// introspection is a containerd that knows nothing but its plugins.
type introspection struct {
	introspectionapi.UnimplementedIntrospectionServer
	plugins []*introspectionapi.Plugin
	asked   chan []string
}

// Plugins implements the introspection service.
func (i *introspection) Plugins(_ context.Context, r *introspectionapi.PluginsRequest) (*introspectionapi.PluginsResponse, error) {
	i.asked <- r.Filters
	return &introspectionapi.PluginsResponse{Plugins: i.plugins}, nil
}

// containerdAt serves i where the configuration says containerd is.
func containerdAt(t *testing.T, c *config.Config, i *introspection) {
	t.Helper()
	i.asked = make(chan []string, 1)
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Containerd.Address)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	introspectionapi.RegisterIntrospectionServer(srv, i)
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-done //nolint:errcheck // only its end counts
	})
}

func TestContainerdThatCannotPull(t *testing.T) {
	t.Parallel()
	gantry := []*introspectionapi.Plugin{{Type: "io.containerd.snapshotter.v1", ID: "gantry"}}
	for name, tc := range map[string]struct {
		plugins []*introspectionapi.Plugin
		want    []string
	}{
		"without gantry":  {nil, []string{`runs without gantry: it has no snapshotter "gantry"`, "gantry config containerd", "--no-containerd"}},
		"without gantryd": {gantry, []string{"gantryd is not running", "--no-containerd"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(t)
			s.image(t, "v1", 1, 1000)
			c := node(t, s)
			c.Address = filepath.Join(t.TempDir(), "gantry.sock")
			i := &introspection{plugins: tc.plugins}
			containerdAt(t, c, i)
			_, _, err := pull(t, c, Options{Ref: s.ref("v1")})
			for _, want := range tc.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want %q in it", err, want)
				}
			}
			if got := <-i.asked; len(got) != 1 || got[0] != "type==io.containerd.snapshotter.v1,id==gantry" {
				t.Errorf("containerd was asked for %q", got)
			}
			if sum := mustPull(t, c, Options{Ref: s.ref("v1"), NoContainerd: true}); sum.Fetched != 1000 {
				t.Errorf("got %+v, want it fetched without containerd", sum)
			}
		})
	}
}

func TestListens(t *testing.T) {
	t.Parallel()
	c := node(t)
	check := func(what string, want bool) {
		t.Helper()
		if got, err := listens(t.Context(), c.Containerd.Address); got != want || err != nil {
			t.Errorf("%s: got %v, %v; want %v", what, got, err, want)
		}
	}
	check("nothing", false)
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", c.Containerd.Address)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	check("a server", true)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	check("what a server left", false)
}

func TestHostDir(t *testing.T) {
	t.Parallel()
	first, second := t.TempDir(), t.TempDir()
	for _, dir := range []string{filepath.Join(first, "a:5000"), filepath.Join(second, "a:5000"), filepath.Join(second, "b")} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	path := first + ":" + second + "::" + filepath.Join(first, "absent")
	for host, want := range map[string]string{"a:5000": first, "b": second, "c": ""} {
		if got, err := hostDir(path, host); got != want || err != nil {
			t.Errorf("%s: got %q, %v; want %q", host, got, err, want)
		}
	}
}

// TestCredentialsAnswer always answers: containerd would wait for ever.
func TestCredentialsAnswer(t *testing.T) {
	t.Parallel()
	broken := errors.New("the helper is broken")
	c := &credentials{lookup: func(host string) (string, string, error) {
		if host == "a" {
			return "user", "secret", nil
		}
		return "", "", broken
	}}
	got, err := c.GetCredentials(t.Context(), "a/b:c", "a")
	if err != nil || got.Username != "user" || got.Secret != "secret" || c.failure() != nil {
		t.Errorf("got %+v, %v, %v", got, err, c.failure())
	}
	if got, err = c.GetCredentials(t.Context(), "a/b:c", "b"); err != nil || got.Username != "" || !errors.Is(c.failure(), broken) {
		t.Errorf("got %+v, %v, %v; want nobody, and the failure kept", got, err, c.failure())
	}
}

// TestFollowing makes layers of what containerd and gantryd say.
func TestFollowing(t *testing.T) {
	t.Parallel()
	began := time.Now()
	desc := ocispec.Descriptor{Digest: digest.FromString("layer"), Size: 1000}
	report := func(phase transfer.Phase, started time.Duration, received, fetched int64) *status.Report {
		return &status.Report{Transfers: []status.Transfer{
			{Digest: digest.FromString("another"), Size: 1000, Received: 1, Fetched: 1, Started: began},
			{Digest: desc.Digest, Size: desc.Size, Phase: string(phase), Started: began.Add(started), Frontier: received, Received: received, Fetched: fetched, Rate: 7},
		}}
	}
	with := func(r *status.Report, unpack *status.Unpack, recent *status.Layer) *status.Report {
		if unpack != nil {
			unpack.Digest, unpack.Size = desc.Digest, desc.Size
			r.Unpacks = append(r.Unpacks, *unpack)
		}
		if recent != nil {
			recent.Digest, recent.Size = desc.Digest, desc.Size
			r.Recent = append(r.Recent, *recent)
		}
		return r
	}
	event := func(what string, progress int64) ctransfer.Progress {
		return ctransfer.Progress{Event: what, Progress: progress}
	}
	waiting := event("waiting", 0)
	spent := status.Seconds{Total: 2, Download: 1}
	for name, tc := range map[string]struct {
		before, now *status.Report
		event       ctransfer.Progress
		want        Layer
	}{
		"nothing known": {nil, &status.Report{}, waiting, Layer{Phase: PhaseWaiting}},
		"fetching":      {nil, report(transfer.PhaseFetching, 1, 400, 300), waiting, Layer{Phase: PhaseFetching, Received: 400, Fetched: 300, Rate: 7}},
		"elsewhere":     {nil, report(transfer.PhaseLock, 1, 400, 0), waiting, Layer{Phase: PhaseLock, Received: 400, Rate: 7}},
		"begun for somebody else": {report(transfer.PhaseFetching, -time.Hour, 400, 300), report(transfer.PhaseFetching, -time.Hour, 600, 500), waiting,
			Layer{Phase: PhaseFetching, Received: 600, Fetched: 200, Rate: 7}},
		"two in a row": {report(transfer.PhaseFetching, 1, 400, 300), report(transfer.PhaseFetching, 2, 500, 100), waiting,
			Layer{Phase: PhaseFetching, Received: 500, Fetched: 400, Rate: 7}},
		"unpacked while fetched": {nil, with(report(transfer.PhaseFetching, 1, 400, 300), &status.Unpack{Read: 350, Written: 900}, nil), waiting,
			Layer{Phase: PhaseFetching, Received: 400, Fetched: 300, Rate: 7, Read: 350, Written: 900}},
		"the rest is unpacked": {nil, with(report(transfer.PhaseComplete, 1, 1000, 1000), &status.Unpack{Read: 350, Written: 900}, nil), waiting,
			Layer{Phase: PhaseUnpacking, Received: 1000, Fetched: 1000, Rate: 7, Read: 350, Written: 900}},
		"done": {report(transfer.PhaseFetching, 1, 400, 300), with(&status.Report{}, nil, &status.Layer{Started: began.Add(1), Fetched: 1000, Written: 3000, Seconds: spent}), waiting,
			Layer{Phase: PhaseDone, Received: 1000, Fetched: 1000, Read: 1000, Written: 3000, Seconds: spent}},
		"done before": {nil, with(&status.Report{}, nil, &status.Layer{Started: began.Add(-time.Hour), Fetched: 1000, Seconds: spent}), event("already exists", 0),
			Layer{Phase: PhaseExists, Received: 1000}},
		"its unpack failed": {nil, with(&status.Report{}, nil, &status.Layer{Started: began.Add(1), Error: "no space"}), waiting,
			Layer{Phase: PhaseFailed, Read: 1000, Error: "no space"}},
		"failed in the past": {nil, report(transfer.PhaseFailed, -time.Minute, 400, 400), waiting, Layer{Phase: PhaseWaiting}},
		"containerd fetches": {nil, report(transfer.PhaseFailed, 1, 400, 400), event("downloading", 700),
			Layer{Phase: PhaseFetching, Received: 700, Fetched: 400, Rate: 7}},
		"containerd has fetched": {nil, with(report(transfer.PhaseFailed, 1, 400, 400), nil, &status.Layer{Started: began.Add(1), Fetched: 400}), event("complete", 1000),
			Layer{Phase: PhaseDone, Received: 1000, Fetched: 1000, Rate: 7, Read: 1000}},
		"containerd has fetched, its layer file is there": {nil, report(transfer.PhaseFailed, 1, 400, 400), event("complete", 1000),
			Layer{Phase: PhaseDone, Received: 400, Fetched: 1000, Rate: 7}},
		"containerd alone fetches":     {nil, &status.Report{}, event("downloading", 700), Layer{Phase: PhaseFetching, Received: 700, Fetched: 700}},
		"containerd alone has fetched": {nil, &status.Report{}, event("complete", 1000), Layer{Phase: PhaseWaiting, Fetched: 1000}},
		"its transfer is over": {report(transfer.PhaseVerifying, 1, 1000, 1000), &status.Report{}, waiting,
			Layer{Phase: PhaseUnpacking, Received: 1000, Fetched: 1000}},
		"its layer file is there": {nil, report(transfer.PhaseComplete, 1, 1000, 0), event("complete", 1000), Layer{Phase: PhaseDone, Received: 1000, Rate: 7}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			f := &following{state: State{Started: began}, events: events{}, loaded: map[digest.Digest]bool{}, seen: map[seenKey]seen{}}
			f.event(ctransfer.Progress{Event: "downloading", Desc: &desc, Progress: 1})
			if tc.before != nil {
				f.layer(desc, tc.before, tc.event)
			}
			tc.want.Digest, tc.want.Size = desc.Digest, desc.Size
			if got := f.layer(desc, tc.now, tc.event); !reflect.DeepEqual(got, tc.want) {
				t.Errorf("got  %+v\nwant %+v", got, tc.want)
			}
		})
	}
}

// TestGantrydHangs wants no rate told that nobody vouches for any more.
func TestGantrydHangs(t *testing.T) {
	t.Parallel()
	desc := ocispec.Descriptor{Digest: digest.FromString("layer"), Size: 1000}
	f := &following{
		layers: []ocispec.Descriptor{desc}, seen: map[seenKey]seen{}, loaded: map[digest.Digest]bool{},
		latest: &status.Report{Transfers: []status.Transfer{
			{Digest: desc.Digest, Size: desc.Size, Phase: string(transfer.PhaseFetching), Received: 400, Rate: 7, Started: time.Now()},
		}},
		report: func(context.Context) (*status.Report, error) { return nil, context.DeadlineExceeded },
	}
	if l := f.snapshot(t.Context()).Layers[0]; l.Rate != 0 || l.Received != 400 || l.Phase != PhaseFetching {
		t.Errorf("got %+v, want what was there, and no rate", l)
	}
}
