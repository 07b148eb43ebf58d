package integration

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// pullSummary is the last line of `gantry pull --json`.
type pullSummary struct {
	Event    string `json:"event"`
	Digest   string `json:"digest"`
	Via      string `json:"via"`
	Unpacked bool   `json:"unpacked"`
	Size     int64  `json:"size"`    // bytes
	Fetched  int64  `json:"fetched"` // bytes
	Layers   []struct {
		Digest  string             `json:"digest"`
		Phase   string             `json:"phase"`
		Size    int64              `json:"size"`    // bytes
		Fetched int64              `json:"fetched"` // bytes
		Written int64              `json:"written"` // bytes
		Seconds map[string]float64 `json:"seconds"`
	} `json:"layers"`
}

// gantryPull runs `gantry pull --json` and returns its last line.
func gantryPull(t *testing.T, n *harness.Node, args ...string) pullSummary {
	t.Helper()
	out, err := n.GantryCLI(t.Context(), append([]string{"pull", "--json"}, args...)...)
	if err != nil {
		t.Fatalf("gantry pull: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(out), "\n")
	var s pullSummary
	for _, line := range lines {
		s = pullSummary{}
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
	}
	if s.Event != "summary" {
		t.Fatalf("the last line is %q, want the summary", lines[len(lines)-1])
	}
	return s
}

// TestPullCommand pulls through containerd: gantry fetches each layer once, the summary says so, and the image runs.
func TestPullCommand(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "command", small(31, 8<<20))
	s := gantryPull(t, n, "--namespace", "mine", ref)
	checkRegistryLog(t, r, im)
	checkImage(t, n, "mine", ref)
	mustRun(t, n, "mine", ref, "31", "/helper", "cat", "/etc/link")
	if s.Via != "containerd" || !s.Unpacked || s.Digest != im.Manifest.Digest.String() || s.Fetched != im.Size() || len(s.Layers) != len(im.Layers) {
		t.Errorf("got %+v, want all %d bytes of %s through containerd", s, im.Size(), im.Manifest.Digest)
	}
	for i, l := range s.Layers {
		if l.Digest != im.Layers[i].Digest.String() || l.Phase != "done" || l.Fetched != l.Size || l.Written == 0 || l.Seconds["total"] == 0 {
			t.Errorf("layer %d: got %+v, want it fetched and unpacked", i, l)
		}
	}
	p.Forget()
	out, err := n.GantryCLI(t.Context(), "pull", "--quiet", "--namespace", "mine", ref)
	if want := p.Host() + "/command@" + im.Manifest.Digest.String() + "\n"; err != nil || out != want {
		t.Errorf("the second pull printed %q (%v), want %q", out, err, want)
	}
	if sent := p.BlobBytes(); len(sent) > 0 {
		t.Errorf("the second pull was sent %v, want no blob", sent)
	}
	if again := gantryPull(t, n, "--namespace", "other", ref); again.Fetched != 0 || !again.Unpacked || again.Layers[2].Phase != "exists" {
		t.Errorf("another namespace: got %+v, want nothing fetched", again)
	}
	checkNoLease(t, n, "mine")
}

// TestPullCommandWithoutContainerd fetches while containerd is away. Its pull then asks the registry for no layer.
func TestPullCommandWithoutContainerd(t *testing.T) {
	needGantry(t)
	for name, gantryd := range map[string]bool{"with gantryd": true, "alone": false} {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			im, ref := push(t, r, p.Host(), "away", small(32, 8<<20))
			if err := n.Containerd().Stop(); err != nil {
				t.Fatal(err)
			}
			if !gantryd {
				if err := n.Gantryd().Stop(); err != nil {
					t.Fatal(err)
				}
			}
			s := gantryPull(t, n, ref)
			if s.Via != "transfers" || s.Unpacked || s.Fetched != im.Size() {
				t.Errorf("got %+v, want %d bytes fetched without containerd", s, im.Size())
			}
			checkBlobBytes(t, p, im, 1)
			if again := gantryPull(t, n, ref); again.Fetched != 0 || again.Layers[0].Phase != "exists" {
				t.Errorf("the second pull: got %+v, want nothing fetched", again)
			}
			if !gantryd {
				if err := n.StartGantryd(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.StartContainerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			p.Forget()
			mustPull(t, n, "default", ref)
			checkBlobBytes(t, p, im, 0)
			checkImage(t, n, "default", ref)
			mustRun(t, n, "default", ref, "32", "/helper", "cat", "/etc/link")
		})
	}
}

// checkBlobBytes wants each layer sent so many times.
func checkBlobBytes(t *testing.T, p *harness.Proxy, im *harness.Image, times int64) {
	t.Helper()
	sent := p.BlobBytes()
	for i, l := range im.Layers {
		var sum int64
		for _, n := range sent[l.Digest] {
			sum += n
		}
		if sum != times*l.Size {
			t.Errorf("layer %d: %v was sent, want %d times %d", i, sent[l.Digest], times, l.Size)
		}
	}
}

// TestPullCommandInterrupted presses Ctrl-C in the middle, both ways. The same command fetches the rest alone.
func TestPullCommandInterrupted(t *testing.T) {
	needGantry(t)
	for name, flag := range map[string]string{"containerd": "--no-containerd=false", "transfers": "--no-containerd"} {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{GantryExtra: "[transfer]\nchunk_size = 1048576\n"})
			im, ref := push(t, r, p.Host(), "interrupted", small(33, 24<<20))
			p.SetRule(func(*http.Request) *harness.Fault { return &harness.Fault{BytesPerSecond: 1 << 20} })
			cmd := exec.CommandContext(t.Context(), filepath.Join(os.Getenv("GANTRY_BIN"), "gantry"),
				"--config", filepath.Join(n.Dir, "gantry.toml"), "pull", flag, ref)
			var stdout, stderr bytes.Buffer
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			waitFor(t, func() bool { return p.SentTo(harness.Gantry) > 4<<20 })
			if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			err := cmd.Wait()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(stderr.String(), "interrupted; what was fetched is kept in "+n.Dir) {
				t.Fatalf("got %v, %q; want exit code 1 and what is kept\n%s", err, stderr.String(), stdout.String())
			}
			p.SetRule(nil)
			s := gantryPull(t, n, flag, ref)
			if s.Unpacked != (name == "containerd") || s.Fetched >= im.Size()-(2<<20) {
				t.Errorf("got %+v, want the rest of %d bytes fetched", s, im.Size())
			}
			// What a connection had brought of a chunk counts too; what lay in its buffers was sent and is lost.
			var sent int64
			for _, clients := range p.BlobBytes() {
				sent += clients[harness.Gantry]
			}
			if limit := im.Size() + 8<<20; sent > limit {
				t.Errorf("%d bytes were sent in all, want no more than %d", sent, limit)
			}
		})
	}
}

// TestPullCommandFails has one layer missing, which is known only when the others are complete. They are kept for the
// next pull, though containerd's garbage collection comes between.
func TestPullCommandFails(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "fails", small(37, 4<<20))
	missing := im.Layers[1].Digest
	p.SetRule(func(r *http.Request) *harness.Fault {
		if !strings.HasSuffix(r.URL.Path, missing.String()) {
			return nil
		}
		return &harness.Fault{Latency: time.Second, Status: http.StatusNotFound}
	})
	_, err := n.GantryCLI(t.Context(), "pull", ref)
	for _, want := range []string{missing.String(), "what was fetched is kept in ", "host " + p.Host() + ", attempt 1: 404 Not Found"} {
		if err == nil || strings.Count(err.Error(), want) != 1 && want != missing.String() || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q in it, and nothing twice", err, want)
		}
	}
	p.SetRule(nil)
	if _, err := n.Ctr(t.Context(), "default", "content", "prune", "references"); err != nil {
		t.Fatal(err)
	}
	if s := gantryPull(t, n, ref); !s.Unpacked || s.Fetched > im.Layers[1].Size {
		t.Errorf("got %+v, want only the layer that was missing fetched", s)
	}
	checkBlobBytes(t, p, im, 1)
	checkNoLease(t, n, "default")
}

// checkNoLease wants nothing left that keeps an image's content when the image is removed.
func checkNoLease(t *testing.T, n *harness.Node, namespace string) {
	t.Helper()
	if left, err := n.Ctr(t.Context(), namespace, "leases", "list", "--quiet"); err != nil || strings.TrimSpace(left) != "" {
		t.Errorf("leases are left: %q (%v)", left, err)
	}
}

// waitFor polls until it is true.
func waitFor(t *testing.T, what func() bool) {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(time.Minute)
	for !what() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("it did not come to that")
		}
	}
}

// TestPullCommandLogin pulls from a registry that wants a login, which docker's config.json holds: containerd asks the
// command for it, gantryd and the command read it themselves.
func TestPullCommandLogin(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	im, ref := push(t, r, p.Host(), "login", small(35, 4<<20))
	p.SetRule(func(*http.Request) *harness.Fault { return &harness.Fault{Login: login} })
	for _, way := range []string{"--no-containerd", "--no-containerd=false"} {
		if _, err := n.GantryCLI(t.Context(), "pull", way, ref); err == nil || !strings.Contains(err.Error(), ref) {
			t.Errorf("got %v without a login, want an error about %s", err, ref)
		}
	}
	auth := base64.StdEncoding.EncodeToString([]byte(login))
	if err := os.WriteFile(filepath.Join(n.Dir, "docker.json"), fmt.Appendf(nil, `{"auths": {%q: {"auth": %q}}}`, p.Host(), auth), 0o600); err != nil {
		t.Fatal(err)
	}
	if s := gantryPull(t, n, ref); !s.Unpacked || s.Fetched != im.Size() {
		t.Errorf("got %+v, want all of it fetched and unpacked", s)
	}
	_, ref = push(t, r, p.Host(), "login", small(36, 4<<20))
	if s := gantryPull(t, n, "--no-containerd", ref); s.Via != "transfers" || s.Fetched == 0 {
		t.Errorf("got %+v, want the new layers fetched", s)
	}
}

// TestPullCommandForKubelet pulls into the kubelet's namespace: containerd's CRI plugin takes the image for its own.
func TestPullCommandForKubelet(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{CRI: true})
	im, ref := push(t, r, p.Host(), "kubelet", small(38, 1<<20))
	if s := gantryPull(t, n, "--namespace", "k8s.io", ref); !s.Unpacked {
		t.Errorf("got %+v, want it unpacked", s)
	}
	eventually(t, "the CRI plugin to manage the image", func() error {
		out, err := n.Ctr(t.Context(), "k8s.io", "image", "list", `labels."io.cri-containerd.image"==managed`)
		if err == nil && (!strings.Contains(out, ref) || !strings.Contains(out, im.Config.Digest.String())) {
			err = errors.New(out)
		}
		return err
	})
}

// TestPullCommandRefuses pulls where containerd has no gantry, or gantryd is away.
func TestPullCommandRefuses(t *testing.T) {
	needGantry(t)
	n, r, p := setup(t, harness.Options{})
	_, ref := push(t, r, p.Host(), "refused", small(34, 1<<20))
	if err := n.Gantryd().Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := n.GantryCLI(t.Context(), "pull", ref); err == nil || !strings.Contains(err.Error(), "gantryd is not running") {
		t.Errorf("got %v, want that gantryd is not running", err)
	}
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := n.GantryCLI(t.Context(), "pull", ref+"-absent"); err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("got %v, want that it is not found", err)
	}
	checkNoLease(t, n, "default")
}
