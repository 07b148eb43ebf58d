package main

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/gantryd/gantry/plugin/check"
)

type checkServer func(ctx context.Context, r check.Request, send func(check.Event) error) error

func (f checkServer) Run(ctx context.Context, r check.Request, send func(check.Event) error) error {
	return f(ctx, r, send)
}

// checkedBy runs `gantry check` against a server.
func checkedBy(t *testing.T, s checkServer, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "g") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	config, socket := filepath.Join(dir, "c.toml"), filepath.Join(dir, "s")
	if err := os.WriteFile(config, []byte("root = \""+dir+"/root\"\naddress = \""+socket+"\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s != nil {
		l, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		srv := grpc.NewServer()
		check.Register(srv, s)
		done := make(chan error, 1)
		go func() { done <- srv.Serve(l) }()
		t.Cleanup(func() {
			srv.Stop()
			<-done //nolint:errcheck // only its end counts
		})
	}
	var out, errs bytes.Buffer
	code = run(t.Context(), append([]string{"--config", config, "check"}, args...), &out, &errs)
	return code, out.String(), errs.String()
}

func TestCheckCommand(t *testing.T) {
	t.Parallel()
	fault := &check.Fault{What: "blob", Where: "/b", Problem: "its 7 bytes\nare wrong", Meaning: "a push fails", Affected: []string{"ns/a", "ns/b"}, Cure: "pull"}
	cured := *fault
	cured.Cure = "fetched again"
	for name, tc := range map[string]struct {
		events         []check.Event
		err            error
		args           []string
		code           int
		stdout, stderr string
	}{
		"clean":          {[]check.Event{{State: check.Progress}, {State: check.Ended, DoneFiles: 3, DoneBytes: 1 << 20}}, nil, nil, exitOK, "3 files checked, 1.0 MiB read: no faults\n", ""},
		"a fault":        {[]check.Event{{State: check.Found, Fault: fault}, {State: check.Ended}}, nil, nil, exitFailed, "fault: blob /b: its 7 bytes; are wrong: a push fails. Affected: ns/a, ns/b. Cure: pull\n", "gantry: 1 fault"},
		"repaired":       {[]check.Event{{State: check.Found, Fault: fault}, {State: check.Repaired, Fault: &cured}, {State: check.Ended}}, nil, []string{"--repair"}, exitOK, "repaired: blob /b: fetched again\n", ""},
		"not repaired":   {[]check.Event{{State: check.Found, Fault: fault}, {State: check.Failed, Fault: fault}, {State: check.Ended}}, nil, []string{"--repair"}, exitFailed, "not repaired: blob /b: pull\n", "1 of 1 fault not repaired"},
		"not checked":    {nil, errors.New("the disk is away"), nil, exitUsage, "", "the disk is away"},
		"json":           {[]check.Event{{State: check.Found, Fault: fault}, {State: check.Ended}}, nil, []string{"--json"}, exitFailed, `"state":"found","fault":{"what":"blob","where":"/b"`, "1 fault"},
		"a note":         {[]check.Event{{Note: "containerd is away"}, {State: check.Ended}}, nil, nil, exitOK, "note: containerd is away\n", ""},
		"wrong workers":  {nil, nil, []string{"--workers", "-1"}, exitUsage, "", "must not be negative"},
		"wrong argument": {nil, nil, []string{"now"}, exitUsage, "", `unexpected "now"`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			code, stdout, stderr := checkedBy(t, func(_ context.Context, r check.Request, send func(check.Event) error) error {
				if want := strings.Contains(strings.Join(tc.args, " "), "--repair"); r.Repair != want {
					return errors.New("it is asked for something else")
				}
				for _, e := range tc.events {
					if err := send(e); err != nil {
						return err
					}
				}
				return tc.err
			}, tc.args...)
			if code != tc.code || !strings.Contains(stdout, tc.stdout) || !strings.Contains(stderr, tc.stderr) {
				t.Errorf("exit code %d, want %d\n%s\n%s", code, tc.code, stdout, stderr)
			}
		})
	}
}

// Where no gantryd ever ran there is nothing to check, and nothing is made.
func TestCheckOfNothing(t *testing.T) {
	t.Parallel()
	code, _, stderr := checkedBy(t, nil)
	if code != exitUsage || !strings.Contains(stderr, "there is nothing to check") {
		t.Errorf("exit code %d, %s", code, stderr)
	}
}
