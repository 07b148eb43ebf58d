package transfer

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// The test binary runs itself as another process that joins one blob and says on its standard output what it got.
const (
	childRoot = "GANTRY_TEST_TRANSFER_ROOT"
	childURL  = "GANTRY_TEST_TRANSFER_URL"
	childBlob = "GANTRY_TEST_TRANSFER_BLOB"
)

// webServer sends a blob over TCP and counts what it wrote.
type webServer struct {
	*httptest.Server
	gate *gate
	sent atomic.Int64
}

func newWebServer(t *testing.T, data []byte, limit int64) *webServer {
	w := &webServer{gate: newGate(limit)}
	w.Server = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var off, end int64
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &off, &end); err != nil {
			http.Error(rw, err.Error(), http.StatusBadRequest)
			return
		}
		if w.gate.wait(r.Context(), off) != nil {
			return
		}
		rw.Header().Set("Content-Length", strconv.FormatInt(end+1-off, 10))
		rw.WriteHeader(http.StatusPartialContent)
		n, _ := rw.Write(data[off : end+1])
		w.sent.Add(int64(n))
	}))
	t.Cleanup(func() {
		w.CloseClientConnections()
		w.Close()
	})
	return w
}

// webSource asks a webServer.
type webSource struct{ url string }

func (webSource) Host() string { return "web" }

func (webSource) Tier() int { return 0 }

func (s webSource) Open(ctx context.Context, off, n int64) (Body, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, nil)
	if err != nil {
		return Body{}, err
	}
	req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", off, off+n-1))
	c := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	resp, err := c.Do(req)
	if err != nil {
		return Body{}, err
	}
	return Body{ReadCloser: resp.Body, Off: off, N: n}, nil
}

func runChild(root string) {
	if err := child(context.Background(), root); err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
}

func child(ctx context.Context, root string) (err error) {
	var b Blob
	if err := json.Unmarshal([]byte(os.Getenv(childBlob)), &b); err != nil {
		return err
	}
	m, err := New(root, lockOptions)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.Close()) }()
	h, err := m.Join(ctx, "", b, webSource{os.Getenv(childURL)})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	for last := int64(-1); ; {
		if f := h.Frontier(); f != last {
			fmt.Println("frontier", f)
			last = f
		}
		wait, cancel := context.WithTimeout(ctx, 5*time.Millisecond)
		err := h.Wait(wait)
		cancel()
		if err == nil {
			fmt.Println("done")
			return nil
		}
		if !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
}

// process is the test binary at work.
type process struct {
	*exec.Cmd
	lines *bufio.Scanner
}

func startProcess(t *testing.T, root, url string, b Blob) *process {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	blob, err := json.Marshal(b)
	if err != nil {
		t.Fatal(err)
	}
	p := &process{Cmd: exec.CommandContext(t.Context(), self)}
	p.Env = append(os.Environ(), childRoot+"="+root, childURL+"="+url, childBlob+"="+string(blob))
	out, err := p.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.lines = bufio.NewScanner(out)
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = p.Process.Kill()
		_, _ = io.Copy(io.Discard, out)
		_ = p.Wait()
	})
	return p
}

// until reads what the process says.
func (p *process) until(t *testing.T, line string) {
	t.Helper()
	for p.lines.Scan() {
		if p.lines.Text() == line {
			return
		}
		if strings.HasPrefix(p.lines.Text(), "error") {
			break
		}
	}
	t.Fatalf("the other process said %q, want %q", p.lines.Text(), line)
}

// TestKilledHolder has another process hold the transfer and be killed: its lock is free, and nothing is fetched twice.
func TestKilledHolder(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(1, 12<<20+3)
	root := t.TempDir()
	web := newWebServer(t, data, 4<<20)
	p := startProcess(t, root, web.URL, b)
	p.until(t, fmt.Sprint("frontier ", 4<<20))
	own := newWebServer(t, data, b.Size)
	m := newManager(t, root, lockOptions)
	h, said := joinLogged(t, m, b, webSource{own.URL})
	frontierOf(t, h, 4<<20)
	if s := m.List()[0]; s.Phase != PhaseLock {
		t.Errorf("phase %s", s.Phase)
	}
	if who, want := holder(lockPath(root, folderName(root, b))), fmt.Sprintf("process %d (", p.Process.Pid); !strings.HasPrefix(who, want) {
		t.Errorf("the holder is %q, want %q and its name", who, want)
	}
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	complete(t, h, data)
	if l := said.messages(); len(l) != 2 || !strings.HasPrefix(l[0], fmt.Sprintf("process %d (", p.Process.Pid)) ||
		l[1] != fmt.Sprintf("whoever fetched the blob has stopped: going on from %d of %d bytes", 4<<20, b.Size) {
		t.Errorf("the log says %q", l)
	}
	if n := web.sent.Load() + own.sent.Load(); n != b.Size || h.job.currentGeneration() != 0 {
		t.Errorf("sent %d bytes, want %d; generation %d", n, b.Size, h.job.currentGeneration())
	}
}

// TestStoppedHolder has another process hold the transfer and be stopped: after GiveUp this one goes on by itself. When
// the other one runs again it takes what was finished here.
func TestStoppedHolder(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(2, 12<<20+3)
	root := t.TempDir()
	web := newWebServer(t, data, 4<<20)
	p := startProcess(t, root, web.URL, b)
	p.until(t, fmt.Sprint("frontier ", 4<<20))
	own := newWebServer(t, data, b.Size)
	m := newManager(t, root, stuckAfter(2*time.Second))
	h, said := joinLogged(t, m, b, webSource{own.URL})
	frontierOf(t, h, 4<<20)
	if err := p.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	complete(t, h, data)
	if l := said.messages(); len(l) != 2 || !strings.Contains(l[1], "made no progress for 2s: going on with a copy") {
		t.Errorf("the log says %q", l)
	}
	if err := p.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	p.until(t, "done")
	if err := p.Wait(); err != nil {
		t.Error(err)
	}
	if n := web.sent.Load() + own.sent.Load(); n != b.Size {
		t.Errorf("sent %d + %d bytes, want %d", web.sent.Load(), own.sent.Load(), b.Size)
	}
	if _, err := os.Stat(folderPath(root, folderName(root, b))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("what the other one had is left: %v", err)
	}
}
