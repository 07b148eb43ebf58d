//go:build systemd

package integration

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/gantryd/gantry/integration/harness"
)

// unitNode is a gantryd that systemd runs by the unit that gantryd prints.
type unitNode struct {
	*harness.Systemd
	config, socket string
	conn           *grpc.ClientConn
}

func newUnitNode(t *testing.T) *unitNode {
	t.Helper()
	folder, err := harness.NewPrivateFolder()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := folder.Close(); err != nil {
			t.Error(err)
		}
	})
	n := &unitNode{config: filepath.Join(folder.Path, "gantry.toml"), socket: filepath.Join(folder.Path, "state", "gantry.sock")}
	n.configure(t, fmt.Sprintf("root = '%[1]s/root'\nstate = '%[1]s/state'\n", folder.Path))
	gantryd, err := harness.Program("gantryd")
	if err != nil {
		t.Fatal(err)
	}
	if gantryd, err = filepath.Abs(gantryd); err != nil {
		t.Fatal(err)
	}
	unit, err := exec.CommandContext(t.Context(), gantryd, "--config", n.config, "config", "systemd").Output()
	if err != nil {
		t.Fatal(err)
	}
	// The watchdog shall not take a minute.
	impatient := strings.Replace(string(unit), "WatchdogSec=60s", "WatchdogSec=3s", 1)
	if impatient == string(unit) {
		t.Fatalf("the unit has no WatchdogSec=60s:\n%s", unit)
	}
	n.Systemd, err = harness.StartSystemd(t.Context(), folder.Path, map[string]string{"gantryd.service": impatient})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(n.Tail())
		}
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	// As containerd connects to its proxy plugins.
	patience := backoff.DefaultConfig
	patience.MaxDelay = 3 * time.Second
	n.conn, err = grpc.NewClient("unix://"+n.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: patience}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.conn.Close() })
	return n
}

func (n *unitNode) configure(t *testing.T, text string) {
	t.Helper()
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (n *unitNode) ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.Ctl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (n *unitNode) property(t *testing.T, name string) string {
	t.Helper()
	return n.ctl(t, "show", "--value", "--property", name, "gantryd")
}

// call makes calls one after the other until it is told to stop, and returns their errors.
func (n *unitNode) call(t *testing.T) (stop func() (calls int, errs []error)) {
	t.Helper()
	var calls atomic.Int64
	var errs []error
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(t.Context(), "default"))
	client := snapshotsapi.NewSnapshotsClient(n.conn)
	wg.Go(func() {
		for ctx.Err() == nil {
			_, err := client.Cleanup(context.WithoutCancel(ctx), &snapshotsapi.CleanupRequest{})
			if calls.Add(1); err != nil {
				errs = append(errs, err)
			}
		}
	})
	return func() (int, []error) {
		cancel()
		wg.Wait()
		return int(calls.Load()), errs
	}
}

// TestUnit has systemd itself restart gantryd in each way while a client calls, as containerd does.
func TestUnit(t *testing.T) {
	n := newUnitNode(t)
	n.ctl(t, "start", "gantryd")
	for _, tc := range []struct {
		name string
		do   []string
		cut  int // calls that may be under way in a gantryd that does not end by itself
	}{
		{"restart", []string{"restart", "gantryd"}, 0},
		{"stop by signal", []string{"kill", "--signal=TERM", "gantryd"}, 0},
		{"kill", []string{"kill", "--signal=KILL", "gantryd"}, 1},
		{"crash", []string{"kill", "--signal=ABRT", "gantryd"}, 1},
		{"hang", []string{"kill", "--signal=STOP", "gantryd"}, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := n.property(t, "MainPID")
			stop := n.call(t)
			time.Sleep(100 * time.Millisecond)
			n.ctl(t, tc.do...)
			for deadline := time.Now().Add(30 * time.Second); n.property(t, "MainPID") == before || n.property(t, "ActiveState") != "active"; time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("systemd does not start gantryd again")
				}
			}
			time.Sleep(200 * time.Millisecond)
			calls, errs := stop()
			t.Logf("%d calls, failed: %v", calls, errs)
			if len(errs) > tc.cut {
				t.Errorf("%d of %d calls failed: %v", len(errs), calls, errs)
			}
			for _, err := range errs {
				if strings.Contains(err.Error(), "refused") {
					t.Errorf("a call was refused: %v", err)
				}
			}
		})
	}
	t.Run("bad configuration", func(t *testing.T) {
		n.ctl(t, "stop", "gantryd")
		n.configure(t, "nope = 1\n")
		if _, err := n.Ctl(t.Context(), "start", "gantryd"); err == nil {
			t.Error("it starts")
		}
		time.Sleep(time.Second)
		if state, restarts := n.property(t, "ActiveState"), n.property(t, "NRestarts"); state != "failed" || restarts != "0" {
			t.Errorf("the unit is %s after %s starts more, want failed after none", state, restarts)
		}
	})
}
