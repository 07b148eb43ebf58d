package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/plugin/status"
)

// manager is what systemd is for a service that notifies it.
type manager struct{ *net.UnixConn }

func newManager(t *testing.T) *manager {
	t.Helper()
	dir, err := os.MkdirTemp("", "gantry")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "n"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return &manager{conn}
}

func (m *manager) env() string { return "NOTIFY_SOCKET=" + m.LocalAddr().String() }

// wait waits for a message that begins so, and returns the file that came with it, if one did.
func (m *manager) wait(t *testing.T, want string) *os.File {
	t.Helper()
	if err := m.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	text, rights := make([]byte, 1000), make([]byte, 1000)
	for {
		n, oob, _, _, err := m.ReadMsgUnix(text, rights)
		if err != nil {
			t.Fatalf("waiting for %q: %v", want, err)
		}
		if !strings.HasPrefix(string(text[:n]), want) {
			continue
		}
		if oob == 0 {
			return nil
		}
		messages, err := unix.ParseSocketControlMessage(rights[:oob])
		if err != nil {
			t.Fatal(err)
		}
		fds, err := unix.ParseUnixRights(&messages[0])
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fds[0]), "kept")
		t.Cleanup(func() { _ = f.Close() })
		return f
	}
}

// TestRestartRefusesNobody restarts gantryd as systemd does, which keeps its socket: who calls meanwhile is answered by the new one.
func TestRestartRefusesNobody(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]syscall.Signal{"stopped": syscall.SIGTERM, "killed": syscall.SIGKILL} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			systemd := newManager(t)
			g := startLogging(t, nil, systemd.env())
			kept := systemd.wait(t, "FDSTORE=1\nFDNAME=gantry")
			if kept == nil {
				t.Fatal("no file came with FDSTORE")
			}
			for range 2 { // the second one passes on what it was passed
				g.signal(t, end)
				_ = g.cmd.Wait()
				called := make(chan error, 1)
				conn := connect(t, g.socket)
				go func() {
					ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
					defer cancel()
					_, err := status.Get(ctx, conn)
					called <- err
				}()
				select {
				case err := <-called:
					t.Fatalf("a call while there is no gantryd ended at once: %v", err)
				case <-time.After(200 * time.Millisecond):
				}
				g.spawn(t, nil, []string{systemd.env()}, kept)
				if err := <-called; err != nil {
					t.Fatalf("a call while there was no gantryd: %v\n%s", err, g.stderr)
				}
			}
		})
	}
}

// stopped is a gantryd that systemd has stopped and whose socket it keeps.
func stopped(t *testing.T) (systemd *manager, g *gantryd, kept *os.File) {
	t.Helper()
	systemd = newManager(t)
	g = startLogging(t, nil, systemd.env())
	kept = systemd.wait(t, "FDSTORE=1")
	g.signal(t, syscall.SIGTERM)
	_ = g.cmd.Wait()
	return systemd, g, kept
}

// TestPassedTheWrongSocket passes one that nobody who connects to gantryd's address reaches.
func TestPassedTheWrongSocket(t *testing.T) {
	t.Parallel()
	systemd, g, kept := stopped(t)
	if err := os.Remove(g.socket); err != nil { // as if config.toml had another address since
		t.Fatal(err)
	}
	g.spawn(t, nil, []string{systemd.env()}, kept)
	systemd.wait(t, "FDSTOREREMOVE=1\nFDNAME=gantry")
	if systemd.wait(t, "FDSTORE=1\nFDNAME=gantry") == nil {
		t.Error("the new socket is not kept")
	}
	systemd.wait(t, "READY=1")
	if _, err := status.Get(t.Context(), connect(t, g.socket)); err != nil {
		t.Errorf("gantryd does not answer: %v\n%s", err, g.stderr)
	}
}

// TestCannotStartTurnsAway damages the database: who calls must not wait for a gantryd that will not come.
func TestCannotStartTurnsAway(t *testing.T) {
	t.Parallel()
	systemd, g, kept := stopped(t)
	if err := os.WriteFile(filepath.Join(filepath.Dir(g.file), "root", "metadata.db"), []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.spawn(t, nil, []string{systemd.env()}, kept)
	systemd.wait(t, "FDSTOREREMOVE=1\nFDNAME=gantry")
	if code := g.exitCode(t); code != exitFailed {
		t.Errorf("exit code %d, want %d\n%s", code, exitFailed, g.stderr)
	}
}

// TestUnitKnowsTheExitCodes compares what the unit starts again after with what gantryd ends with.
func TestUnitKnowsTheExitCodes(t *testing.T) {
	t.Parallel()
	var never []string
	for line := range strings.Lines(unit) {
		if codes, ok := strings.CutPrefix(line, "RestartPreventExitStatus="); ok {
			never = strings.Fields(codes)
		}
	}
	hung := start(t)
	hung.signal(t, syscall.SIGABRT) // as the watchdog does
	if code := hung.exitCode(t); slices.Contains(never, fmt.Sprint(code)) {
		t.Errorf("gantryd ends with %d after the watchdog's signal, and then the unit never starts it again", code)
	}
	bad := start(t)
	bad.signal(t, syscall.SIGTERM)
	_ = bad.cmd.Wait()
	if err := os.WriteFile(bad.file, []byte("nope = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	bad.spawn(t, nil, nil, nil)
	if code := bad.exitCode(t); !slices.Contains(never, fmt.Sprint(code)) {
		t.Errorf("gantryd ends with %d after a bad configuration, and the unit starts it again for ever", code)
	}
}
