package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	digest "github.com/opencontainers/go-digest"
	"go.uber.org/goleak"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/status"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestCommandLine(t *testing.T) {
	t.Parallel()
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("[snapshotter]\nmount = 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(t.TempDir(), "empty.toml")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		args   []string
		code   int
		stdout string
		stderr string
	}{
		"nothing":              {nil, exitUsage, "", "no command"},
		"help":                 {[]string{"--help"}, exitOK, "Usage:\n  gantry", ""},
		"help word":            {[]string{"help"}, exitOK, "Usage:\n  gantry", ""},
		"version":              {[]string{"--version"}, exitOK, "gantry " + config.Version, ""},
		"unknown":              {[]string{"statuss"}, exitUsage, "", `unknown command "statuss"`},
		"half a command":       {[]string{"config"}, exitUsage, "", `There is "gantry config containerd"`},
		"help of half":         {[]string{"config", "--help"}, exitUsage, "", `There is "gantry config containerd"`},
		"late configuration":   {[]string{"config", "containerd", "--config", bad}, exitUsage, "", bad + ":2: snapshotter.mount"},
		"late drop-in":         {[]string{"config", "containerd", "--config", empty}, exitOK, "version = 3", ""},
		"unknown flag":         {[]string{"--conf", "x", "status"}, exitUsage, "", "flag provided but not defined: -conf"},
		"help of status":       {[]string{"status", "--help"}, exitOK, "--json", ""},
		"help of containerd":   {[]string{"help", "config", "containerd"}, exitOK, "imports", ""},
		"help of nothing":      {[]string{"help", "nope"}, exitUsage, "", `unknown command "nope"`},
		"unknown status flag":  {[]string{"status", "--xml"}, exitUsage, "", "see gantry help status"},
		"too much":             {[]string{"config", "containerd", "crio"}, exitUsage, "", `unexpected "crio"`},
		"absent configuration": {[]string{"--config", "/absent.toml", "status"}, exitUsage, "", "/absent.toml"},
		"bad configuration":    {[]string{"--config", bad, "config", "containerd"}, exitUsage, "", bad + ":2: snapshotter.mount"},
		"help of pull":         {[]string{"help", "pull"}, exitOK, "gantry pull --namespace k8s.io", ""},
		"pull of nothing":      {[]string{"pull"}, exitUsage, "", "pull: REF is missing; see gantry help pull"},
		"pull of two":          {[]string{"pull", "alpine", "--quiet", "debian"}, exitUsage, "", `pull: unexpected "debian"`},
		"pull of a URL":        {[]string{"pull", "https://x/y"}, exitUsage, "", `image reference "https://x/y"`},
		"pull for nobody":      {[]string{"pull", "alpine", "--platform", "a/b/c/d"}, exitUsage, "", `platform "a/b/c/d"`},
		"pull in two ways":     {[]string{"pull", "--quiet", "alpine", "--json"}, exitUsage, "", "--quiet and --json exclude each other"},
		"drop-in":              {[]string{"--config", empty, "config", "containerd"}, exitOK, "version = 3", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), tc.args, &stdout, &stderr)
			if code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			for what, pair := range map[string][2]string{"stdout": {stdout.String(), tc.stdout}, "stderr": {stderr.String(), tc.stderr}} {
				got, want := pair[0], pair[1]
				if !strings.Contains(got, want) || (want == "" && got != "") {
					t.Errorf("%s: got %q, want %q in it", what, got, want)
				}
			}
		})
	}
}

// node writes a configuration for a socket of the test's own.
func node(t *testing.T) (file, address string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "gantry")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file, address = filepath.Join(dir, "config.toml"), filepath.Join(dir, "g.sock")
	if err := os.WriteFile(file, []byte("address = \""+address+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, address
}

type fixed struct{ report *status.Report }

func (f fixed) Get(context.Context) (*status.Report, error) { return f.report, nil }

func serve(t *testing.T, address string, r *status.Report) {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", address)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	status.Register(srv, fixed{r})
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		srv.Stop()
		<-done //nolint:errcheck // only its end counts
	})
}

func TestStatus(t *testing.T) {
	t.Parallel()
	blob, layer := digest.FromString("blob"), digest.FromString("layer")
	now := time.Now().UTC()
	busy := &status.Report{
		Version: "v1.2.3", PID: 42, Started: now.Add(-time.Minute), Root: "/r", Mount: status.Mount{Mode: "file", Reason: "Linux 6.18", IDMapped: true},
		Transfers: []status.Transfer{
			{Digest: blob, Size: 200 << 20, Frontier: 50 << 20, Received: 60 << 20, Rate: 10 << 20, Phase: "fetching", Hosts: []string{"a:5000", "b"}, Connections: 11, Waiters: 3},
			{Digest: layer, Size: 0, Phase: "failed", Error: "first\nsecond"},
			{Digest: layer, Size: 4 << 20, Frontier: 1 << 20, Received: 3 << 20, Phase: "kept", Started: now.Add(-2 * time.Hour)},
		},
		Unpacks: []status.Unpack{{Digest: blob, Size: 200 << 20, Read: 100 << 20, Written: 300 << 20, Rate: 20 << 20, Phase: "unpacking"}},
		Recent:  []status.Layer{{Namespace: "k8s.io", Image: "reg/app:1", Digest: layer, Size: 1000, Written: 2048, Seconds: status.Seconds{Total: 1.5, Download: 1.25}}},
	}
	shared := &status.Report{Recent: []status.Layer{{Image: "reg/app:1", Digest: layer}}}
	idle := &status.Report{Version: "v1.2.3", PID: 42, Started: now, Root: "/r", Mount: status.Mount{Mode: "directory", NotIDMapped: "too old"}}
	files := &status.Report{Upper: status.Upper{Kind: "file", Size: 10 << 30, Files: 3}}
	old := &status.Report{Upper: status.Upper{Kind: "directory", Files: 2}}
	for name, tc := range map[string]struct {
		report *status.Report
		want   []string
		not    string
	}{
		"shared": {shared, []string{"COMMIT  TAIL   IMAGE\n", "reg/app:1"}, "NAMESPACE"},
		"idle":   {idle, []string{"gantryd v1.2.3, pid 42, up ", "mount mode directory\n", "user namespaces get copies of images: no id-mapped mounts: too old\n", "nothing is under way\n"}, "containers write"},
		"files":  {files, []string{"new containers write to files of 10.0 GiB; 3 snapshots have one\n"}, "directories"},
		"before": {old, []string{"new containers write to directories; 2 snapshots have a file\n"}, "files of"},
		"busy": {busy, []string{
			"up 1m", "root /r", "mount mode file: Linux 6.18\n",
			"fetching  25%   60.0 MiB  200.0 MiB  10.0 MiB/s  11     3      a:5000,b",
			"failed    -     0 B       0 B        -           0      0      -  first; second",
			"kept      25%   3.0 MiB   4.0 MiB    -           0      0      written 2h0m",
			"unpacking  50%   100.0 MiB  200.0 MiB  300.0 MiB  20.0 MiB/s",
			"1000 B  2.0 KiB   1.50s  0.00s   0.00s  1.25s", "k8s.io     reg/app:1",
		}, "nothing is under way"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			file, address := node(t)
			serve(t, address, tc.report)
			var stdout, stderr bytes.Buffer
			if code := run(t.Context(), []string{"--config", file, "status"}, &stdout, &stderr); code != exitOK {
				t.Fatalf("exit code %d: %s", code, stderr.String())
			}
			for _, want := range tc.want {
				if !strings.Contains(stdout.String(), want) {
					t.Errorf("got\n%swant %q in it", stdout.String(), want)
				}
			}
			if strings.Contains(stdout.String(), tc.not) {
				t.Errorf("got\n%swant no %q in it", stdout.String(), tc.not)
			}
			stdout.Reset()
			if code := run(t.Context(), []string{"--config", file, "status", "--json"}, &stdout, &stderr); code != exitOK {
				t.Fatalf("exit code %d: %s", code, stderr.String())
			}
			got := &status.Report{}
			if err := json.Unmarshal(stdout.Bytes(), got); err != nil || !reflect.DeepEqual(got, tc.report) {
				t.Errorf("json: %v\ngot  %+v\nwant %+v", err, got, tc.report)
			}
		})
	}
}

func TestStatusWithoutGantryd(t *testing.T) {
	t.Parallel()
	file, address := node(t)
	check := func(what string) {
		t.Helper()
		var stdout, stderr bytes.Buffer
		code := run(t.Context(), []string{"--config", file, "status"}, &stdout, &stderr)
		if want := "gantryd is not running: nobody answers at " + address; code != exitFailed || !strings.Contains(stderr.String(), want) {
			t.Errorf("%s: exit code %d, %q; want %d, %q", what, code, stderr.String(), exitFailed, want)
		}
	}
	check("no socket")
	l, err := new(net.ListenConfig).Listen(t.Context(), "unix", address)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	check("a socket left by a kill")
}

// TestGantrydHangs asks a gantryd that takes connections and says nothing.
func TestGantrydHangs(t *testing.T) {
	t.Parallel()
	for _, command := range []string{"status", "check", "content restore"} {
		t.Run(command, func(t *testing.T) {
			t.Parallel()
			file, address := node(t)
			l, err := new(net.ListenConfig).Listen(t.Context(), "unix", address)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = l.Close() }()
			ctx, cancel := context.WithTimeout(t.Context(), 3*answerWithin)
			defer cancel()
			var stdout, stderr bytes.Buffer
			code := run(ctx, append([]string{"--config", file}, strings.Fields(command)...), &stdout, &stderr)
			if code == exitOK || !strings.Contains(stderr.String(), address+": "+errNoAnswer.Error()) {
				t.Errorf("exit code %d, %q", code, stderr.String())
			}
		})
	}
}
