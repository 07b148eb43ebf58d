package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	digest "github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/plugin/client"
	"github.com/gantryd/gantry/plugin/status"
)

const mib = 1 << 20

// digestOf makes a digest that begins with n.
func digestOf(n int) digest.Digest {
	return digest.NewDigestFromEncoded(digest.SHA256, fmt.Sprintf("%012d%052d", n, 0))
}

// pulling is a pull with one layer in each phase.
func pulling() client.State {
	return client.State{
		Name: "docker.io/library/alpine:latest", Digest: digestOf(99), Platform: "linux/amd64", Via: client.ViaContainerd,
		Layers: []client.Layer{
			{Digest: digestOf(0), Size: 30 * mib, Phase: client.PhaseWaiting},
			{Digest: digestOf(1), Size: 100 * mib, Phase: client.PhaseLock, Received: 25 * mib},
			{Digest: digestOf(2), Size: 1000 * mib, Phase: client.PhaseFetching, Received: 500 * mib, Rate: 10 * mib},
			{Digest: digestOf(3), Size: 2000, Phase: client.PhaseVerifying, Received: 2000},
			{Digest: digestOf(4), Size: 40 * mib, Phase: client.PhaseUnpacking, Received: 40 * mib, Read: 10 * mib, Written: 30 * mib},
			{Digest: digestOf(5), Size: 10, Phase: client.PhaseExists, Received: 10},
			{Digest: digestOf(6), Size: 3 << 30, Phase: client.PhaseDone, Received: 3 << 30, Seconds: status.Seconds{Total: 123.4}},
			{Digest: digestOf(7), Size: 5 * mib, Phase: client.PhaseFailed, Error: "host a: 500\nhost b: 404"},
		},
	}
}

func TestFrame(t *testing.T) {
	t.Parallel()
	got := strings.Join(frame(pulling(), 61*time.Second, 100, 24), "\n")
	want := strings.TrimPrefix(`
docker.io/library/alpine:latest through containerd, 1m01s
LAYER        PHASE                                       DONE          RECEIVED         RATE    ETA
000000000000 waiting                                                   30.0 MiB
000000000001 lock      another process fetches it: 25.0/100.0 MiB
000000000002 fetching  [==============>                ]  50%  500.0/1000.0 MiB   10.0 MiB/s    50s
000000000003 verifying [===============================] 100%       2.0/2.0 KiB            -      -
000000000004 unpacking [======>                        ]  25%     10.0/40.0 MiB
000000000005 exists                                                        10 B
000000000006 done      [===============================] 100%           3.0 GiB    in 123.4s
000000000007 failed    host a: 500; host b: 404
total        3 of 8    [=========================>     ]  85%       3.6/4.1 GiB   10.0 MiB/s  1m01s`, "\n")
	if got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestFrameFits draws on terminals of every size: no line may reach the last column, no frame the last row, and what
// is under way is seen before what is not.
func TestFrameFits(t *testing.T) {
	t.Parallel()
	s := pulling()
	for i := range 60 {
		s.Layers = append(s.Layers, client.Layer{Digest: digestOf(100 + i), Size: mib, Phase: client.PhaseDone, Received: mib})
	}
	s.Layers[7].Error = strings.Repeat("é", 300)
	for width := 1; width <= 250; width++ {
		for _, height := range []int{1, 2, 3, 4, 5, 10, 24, 100} {
			lines := frame(s, time.Hour, width, height)
			if len(lines) > max(height-1, 1) {
				t.Fatalf("%d×%d: %d lines", width, height, len(lines))
			}
			for _, l := range lines {
				if n := utf8.RuneCountInString(l); n > max(width-1, 1) {
					t.Fatalf("%d×%d: %d columns: %q", width, height, n, l)
				}
			}
			if got := strings.Join(lines, "\n"); width >= 80 && height >= 10 && (!strings.Contains(got, "000000000002 fetching") || !strings.Contains(got, "total ")) {
				t.Fatalf("%d×%d: got\n%s\nwant what is fetched", width, height, got)
			}
		}
	}
	if got := frame(s, 0, 100, 10); !slices.Contains(got, "and 63 more: 61 done, 1 exists, 1 waiting") {
		t.Errorf("got %q, want the rest summed up", got)
	}
}

func TestRedraw(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	v := &screen{out: &out, size: func() (int, int) { return 80, 24 }}
	s := pulling()
	v.tell(client.State{Name: s.Name, Via: s.Via, Started: time.Now()})
	if want := "\r" + s.Name + " through containerd, 0s\x1b[K\nasking the registry\x1b[K\n\x1b[J"; out.String() != want {
		t.Errorf("the first frame is %q, want %q", out.String(), want)
	}
	out.Reset()
	v.tell(s)
	if !strings.HasPrefix(out.String(), "\x1b[2A\r") {
		t.Errorf("the second frame is %q, want it in place of two lines", out.String())
	}
	out.Reset()
	v.erase()
	if want := "\x1b[11A\r\x1b[J"; out.String() != want {
		t.Errorf("the end is %q, want %q", out.String(), want)
	}
}

func TestTimeLeft(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		remaining int64
		rate      float64
		want      string
	}{
		{0, 1, "-"}, {-5, 1, "-"}, {1, 0, "-"}, {1, 10, "1s"}, {59, 1, "59s"}, {60, 1, "1m"}, {61, 1, "1m01s"},
		{3599, 1, "59m59s"}, {3600, 1, "1h"}, {99 * 3600, 1, "99h"}, {5*3600 + 60, 1, "5h01m"}, {100 * 3600, 1, "-"},
	} {
		if got := eta(tc.remaining, tc.rate); got != tc.want || len(got) > 6 {
			t.Errorf("%d bytes at %g: got %s, want %s", tc.remaining, tc.rate, got, tc.want)
		}
	}
}

func TestPortion(t *testing.T) {
	t.Parallel()
	for want, tc := range map[string][2]int64{
		"0/0 B": {0, 0}, "5/1023 B": {5, 1023}, "0.5/1.0 KiB": {512, 1024}, "1023.9/1023.9 MiB": {1<<30 - 1<<16, 1<<30 - 1<<16}, "0.1/2.0 GiB": {100 * mib, 2 << 30},
	} {
		if got := portion(tc[0], tc[1]); got != want || len(got) > 17 {
			t.Errorf("%v: got %q, want %q", tc, got, want)
		}
	}
}

// TestPlain tells of each change once, and of the whole every five seconds.
func TestPlain(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	now := time.Now()
	v := &plainView{out: &out, now: func() time.Time { return now }}
	s := pulling()
	v.tell(client.State{Name: s.Name, Via: s.Via, Platform: s.Platform})
	v.tell(s)
	v.tell(s)
	now = now.Add(totalEvery)
	v.tell(s)
	s.Layers = slices.Clone(s.Layers)
	s.Layers[2].Phase, s.Layers[2].Seconds.Total = client.PhaseDone, 9
	v.tell(s)
	want := `pulling docker.io/library/alpine:latest for linux/amd64 through containerd
` + string(s.Digest) + `: 8 layers, 4.1 GiB
000000000001 lock: another process fetches it
000000000002 fetching 500.0/1000.0 MiB
000000000003 verifying 2.0/2.0 KiB
000000000004 unpacking 40.0/40.0 MiB
000000000005 exists 10 B
000000000006 done 3.0 GiB in 123.40s
000000000007 failed 5.0 MiB  host a: 500; host b: 404
3 of 8 layers, 3.6/4.1 GiB, 85%, 10.0 MiB/s, 1m01s left
000000000002 done 1000.0 MiB in 9.00s
`
	if got := out.String(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

func summaryOf(via string) *client.Summary {
	s := pulling()
	s.Via = via
	s.Layers = []client.Layer{
		{Digest: digestOf(5), Size: 10, Phase: client.PhaseExists, Received: 10},
		{Digest: digestOf(6), Size: 3 * mib, Phase: client.PhaseDone, Received: 3 * mib, Fetched: 2 * mib, Written: 7 * mib,
			Seconds: status.Seconds{Total: 3, Wait: .25, Download: 2, Decompress: 1, Write: .5, Verify: .125, Commit: .375}},
	}
	return &client.Summary{State: s, Unpacked: via == client.ViaContainerd, Folder: "/transfers", Size: 3*mib + 10, Fetched: 2 * mib, Seconds: 4, Rate: mib / 2}
}

func TestSummary(t *testing.T) {
	t.Parallel()
	for via, want := range map[string]string{
		client.ViaContainerd: `LAYER         SIZE     FETCHED  UNPACKED  WAIT   DOWNLOAD  DECOMPRESS  WRITE  VERIFY  COMMIT  TOTAL
000000000005  10 B     exists   -         -      -         -           -      -       -       -
000000000006  3.0 MiB  2.0 MiB  7.0 MiB   0.25s  2.00s     1.00s       0.50s  0.12s   0.38s   3.00s
docker.io/library/alpine@` + string(digestOf(99)) + `
3.0 MiB in 2 layers, 2.0 MiB fetched in 4.00s (512.0 KiB/s), through containerd
`,
		client.ViaTransfers: `LAYER         SIZE     FETCHED  WAIT   DOWNLOAD  VERIFY  TOTAL
000000000005  10 B     exists   -      -         -       -
000000000006  3.0 MiB  2.0 MiB  0.25s  2.00s     0.12s   3.00s
docker.io/library/alpine@` + string(digestOf(99)) + `
3.0 MiB in 2 layers, 2.0 MiB fetched in 4.00s (512.0 KiB/s), without containerd
kept in /transfers for 24h: a pull through containerd takes the layers from there
`,
	} {
		var out bytes.Buffer
		if err := printSummary(&out, summaryOf(via), 24*time.Hour); err != nil || out.String() != want {
			t.Errorf("%s: %v, got\n%swant\n%s", via, err, out.String(), want)
		}
	}
	foreign := summaryOf(client.ViaContainerd)
	foreign.Unpacked = false
	if got := result(foreign, 0); !strings.Contains(got, "\nnot unpacked: ") {
		t.Errorf("got %q, want that it is not unpacked", got)
	}
}

func TestJSONLines(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	now := time.Unix(1, 0).UTC()
	v := &jsonView{out: &out, now: func() time.Time { return now }}
	s := pulling()
	s.Layers = s.Layers[2:4]
	v.tell(client.State{Name: s.Name})
	v.tell(s)
	s.Layers = slices.Clone(s.Layers)
	s.Layers[0].Rate = 20 * mib // alone no news
	v.tell(s)
	s.Layers = slices.Clone(s.Layers)
	s.Layers[0].Received += 100 * mib
	v.tell(s)
	v.fail(errors.New("no"))
	if err := v.end(summaryOf(client.ViaTransfers)); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		var l struct {
			Event, Name, Error, Phase string
			Received                  int64
			Fetched                   int64
			ETA                       float64 `json:"eta_seconds"`
			Layers                    []client.Layer
		}
		if err := json.Unmarshal([]byte(line), &l); err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(l.Event, " ", l.Name, l.Error, l.Phase, " ", l.Received/mib, " ", l.Fetched/mib, " ", l.ETA, " ", len(l.Layers)))
	}
	want := []string{
		"resolved docker.io/library/alpine:latest 0 0 0 2", "layer fetching 500 0 50 0", "layer verifying 0 0 0 0",
		"layer fetching 600 0 20 0", "error no 0 0 0 0", "summary docker.io/library/alpine:latest 0 2 0 2",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
}

// TestPullFails runs the command against a registry that has nothing, and one that never answers until Ctrl-C.
func TestPullFails(t *testing.T) {
	t.Parallel()
	ctx, interrupt := context.WithCancel(t.Context())
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "slow") {
			interrupt()
			<-r.Context().Done()
			return
		}
		w.WriteHeader(http.StatusNotFound)
	}))
	t.Cleanup(srv.Close)
	dir := t.TempDir()
	file := filepath.Join(dir, "gantry.toml")
	text := fmt.Sprintf("root = %q\nstate = %q\n[containerd]\naddress = %q\n[registry]\nconfig_path = \"\"\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), filepath.Join(dir, "absent.sock"))
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	host := strings.TrimPrefix(srv.URL, "http://")
	for _, tc := range []struct{ repository, flag, stdout, stderr string }{
		{"absent", "--quiet", "", "not found"},
		{"absent", "--json=false", "pulling " + host + "/absent:latest for ", "not found"},
		{"absent", "--json", `"event":"error"`, "not found"},
		{"slow", "--quiet", "", "gantry: interrupted; what was fetched is kept in " + filepath.Join(dir, "root", "transfers") + ", run the same command again to go on\n"},
	} {
		var stdout, stderr bytes.Buffer
		code := run(ctx, []string{"--config", file, "pull", host + "/" + tc.repository, tc.flag}, &stdout, &stderr)
		if code != exitFailed || !strings.Contains(stderr.String(), tc.stderr) || !strings.Contains(stdout.String(), tc.stdout) || tc.stdout == "" && stdout.Len() > 0 {
			t.Errorf("%s %s: exit code %d, %q, %q; want %d, %q, %q", tc.repository, tc.flag, code, stdout.String(), stderr.String(), exitFailed, tc.stdout, tc.stderr)
		}
	}
}

// TestWarnings wants blob and host in what libraries warn of.
func TestWarnings(t *testing.T) {
	t.Parallel()
	var out strings.Builder
	warnings(t.Context(), &out).WithField("digest", "sha256:1").WithField("host", "a").WithError(errors.New("b")).Warn("again")
	if got, want := out.String(), "gantry: again (blob sha256:1, host a): b\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
