package main

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	contentapi "github.com/containerd/containerd/api/services/content/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/status"
)

// asGantryd makes the test's program run as gantryd itself.
const asGantryd = "GANTRYD_TEST_AS_GANTRYD"

func TestMain(m *testing.M) {
	if os.Getenv(asGantryd) != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	bad := filepath.Join(t.TempDir(), "bad.toml")
	if err := os.WriteFile(bad, []byte("\nroot = \"relative\"\nnope = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(t.TempDir(), "good.toml")
	if err := os.WriteFile(good, []byte("root = \"/somewhere\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		args   []string
		served error
		code   int
		stdout string
		stderr string
	}{
		"help":           {[]string{"-h"}, nil, exitOK, "Usage:\n  gantryd", ""},
		"version":        {[]string{"--version"}, nil, exitOK, "gantryd " + config.Version, ""},
		"default":        {[]string{"config", "default"}, nil, exitOK, "root = \"/var/lib/gantry\"", ""},
		"dump":           {[]string{"--config", good, "config", "dump"}, nil, exitOK, "root = \"/somewhere\"", ""},
		"unit":           {[]string{"config", "systemd"}, nil, exitOK, "WatchdogSec=", ""},
		"unit's config":  {[]string{"--config", "/odd %dir/g.toml", "config", "systemd"}, nil, exitOK, " --config \"/odd %%dir/g.toml\"\n", ""},
		"half a command": {[]string{"config"}, nil, exitConfig, "", `"config default"`},
		"config help":    {[]string{"config", "--help"}, nil, exitOK, "Usage:\n  gantryd", ""},
		"unknown":        {[]string{"serve"}, nil, exitConfig, "", `unknown command "serve"`},
		"unknown flag":   {[]string{"--root", "/x"}, nil, exitConfig, "", "not defined: -root"},
		"absent file":    {[]string{"--config", "/absent.toml"}, nil, exitConfig, "", "/absent.toml"},
		"bad file":       {[]string{"--config", bad}, nil, exitConfig, "", "gantryd: " + bad + ":2: root: \"relative\" is not absolute; want an absolute path"},
		"all that's bad": {[]string{"--config", bad}, nil, exitConfig, "", "\ngantryd: " + bad + ":3: nope: unknown key"},
		"served":         {[]string{"--config", good}, nil, exitOK, "", ""},
		"failed":         {[]string{"--config", good}, errors.New("no room"), exitFailed, "", "gantryd: no room"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var stdout, stderr bytes.Buffer
			code := run(tc.args, &stdout, &stderr, func(c *config.Config) error {
				if c.Root != "/somewhere" {
					t.Errorf("served with root %s", c.Root)
				}
				return tc.served
			})
			if code != tc.code {
				t.Errorf("exit code %d, want %d", code, tc.code)
			}
			for what, pair := range map[string][2]string{"stdout": {stdout.String(), tc.stdout}, "stderr": {stderr.String(), tc.stderr}} {
				if got, want := pair[0], pair[1]; !strings.Contains(got, want) || (want == "" && got != "") {
					t.Errorf("%s: got %q, want %q in it", what, got, want)
				}
			}
		})
	}
}

func TestUnitStartsThisProgram(t *testing.T) {
	t.Parallel()
	program, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	text, err := systemdUnit("")
	if want := "\nExecStart=" + program + "\n"; err != nil || !strings.Contains(text, want) {
		t.Errorf("got %v\n%s\nwant %q in it", err, text, want)
	}
}

// gantryd is a real one, in a process of its own.
type gantryd struct {
	cmd    *exec.Cmd
	file   string // its configuration
	conn   *grpc.ClientConn
	socket string
	stderr *bytes.Buffer
}

func start(t *testing.T) *gantryd {
	t.Helper()
	return startLogging(t, nil)
}

// startLogging is start with another place for the log, and more in the environment.
func startLogging(t *testing.T, stderr io.Writer, env ...string) *gantryd {
	t.Helper()
	dir, err := os.MkdirTemp("", "gantry")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	file := filepath.Join(dir, "config.toml")
	text := "root = \"" + dir + "/root\"\nstate = \"" + dir + "\"\ncontainerd.address = \"" + dir + "/absent.sock\"\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	g := &gantryd{file: file, socket: dir + "/gantry.sock", stderr: &bytes.Buffer{}}
	g.spawn(t, stderr, env, nil)
	g.conn = connect(t, g.socket)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for {
		if _, err = status.Get(ctx, g.conn); err == nil {
			return g
		}
		g.conn.ResetConnectBackoff()
		select {
		case <-ctx.Done():
			t.Fatalf("gantryd does not answer: %v\n%s", err, g.stderr)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// spawn starts the process. It is passed a file as systemd passes it, if there is one.
func (g *gantryd) spawn(t *testing.T, stderr io.Writer, env []string, passed *os.File) {
	t.Helper()
	// Only the process that becomes gantryd knows its own id.
	g.cmd = exec.CommandContext(context.WithoutCancel(t.Context()), "sh", "-c", `LISTEN_PID=$$ exec "$0" "$@"`, os.Args[0], "--config", g.file)
	g.cmd.Env = append(append(os.Environ(), asGantryd+"=1"), env...)
	if passed != nil {
		g.cmd.ExtraFiles = []*os.File{passed}
		g.cmd.Env = append(g.cmd.Env, "LISTEN_FDS=1", "LISTEN_FDNAMES=gantry")
	}
	g.cmd.Stderr = g.stderr
	if stderr != nil {
		g.cmd.Stderr = stderr
	}
	if err := g.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	cmd := g.cmd
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

func connect(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (g *gantryd) signal(t *testing.T, s os.Signal) {
	t.Helper()
	if err := g.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

func (g *gantryd) exitCode(t *testing.T) int {
	t.Helper()
	err := g.cmd.Wait()
	if _, failed := errors.AsType[*exec.ExitError](err); err != nil && !failed {
		t.Fatal(err)
	}
	return g.cmd.ProcessState.ExitCode()
}

func TestSignalDrains(t *testing.T) {
	t.Parallel()
	g := start(t)
	g.signal(t, syscall.SIGTERM)
	if code := g.exitCode(t); code != exitOK {
		t.Errorf("exit code %d, want %d\n%s", code, exitOK, g.stderr)
	}
}

// closed is a log that nobody reads any more: what is written to it raises SIGPIPE.
type closed struct{}

func (closed) Write([]byte) (int, error) { return 0, os.ErrClosed }

func TestNobodyReadsTheLog(t *testing.T) {
	t.Parallel()
	g := startLogging(t, closed{})
	g.signal(t, syscall.SIGTERM) // is logged
	if err := g.cmd.Wait(); !g.cmd.ProcessState.Success() {
		t.Errorf("gantryd ended with %v", err)
	}
}

func TestSecondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	g := start(t)
	// A client that opens a stream and says no more would hold up a drain.
	ctx := namespaces.WithNamespace(t.Context(), "test")
	w, err := contentapi.NewContentClient(g.conn).Write(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Ref: "default/1/x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Fatal(err)
	}
	g.signal(t, syscall.SIGTERM)
	// The drain has begun once the socket is gone; the stream lives on.
	for {
		if _, err := os.Stat(g.socket); err != nil {
			break
		}
		select {
		case <-t.Context().Done():
			t.Fatal(context.Cause(t.Context()))
		case <-time.After(5 * time.Millisecond):
		}
	}
	if err := w.Send(&contentapi.WriteContentRequest{Action: contentapi.WriteAction_STAT, Ref: "default/1/x"}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Errorf("a call under way was cut off at once: %v", err)
	}
	g.signal(t, syscall.SIGTERM)
	if code, want := g.exitCode(t), 128+int(syscall.SIGTERM); code != want {
		t.Errorf("exit code %d, want %d\n%s", code, want, g.stderr)
	}
}
