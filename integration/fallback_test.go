package integration

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/gantryd/gantry/integration/harness"
)

const login = "pod:secret"

// fromGantry says whether gantryd itself sent the request.
func fromGantry(r *http.Request) bool {
	return strings.HasPrefix(r.UserAgent(), harness.Gantry+"/")
}

func isBlob(r *http.Request) bool { return strings.Contains(r.URL.Path, "/blobs/") }

// TestFallback pulls from registries that only containerd can use. gantry finds
// out, and containerd's own fetch goes on; the image ends up the same.
func TestFallback(t *testing.T) {
	refuse := func(status int) harness.Rule {
		return func(r *http.Request) *harness.Fault {
			if fromGantry(r) && isBlob(r) {
				return &harness.Fault{Status: status}
			}
			return nil
		}
	}
	cases := []struct {
		name   string
		rule   harness.Rule
		scheme string
		args   []string
	}{
		{name: "login only containerd has", scheme: "http", args: []string{"--user", login},
			rule: func(*http.Request) *harness.Fault { return &harness.Fault{Login: login} }},
		{name: "404", scheme: "http", rule: refuse(http.StatusNotFound)},
		{name: "403", scheme: "http", rule: refuse(http.StatusForbidden)},
		{name: "gantry believes it speaks TLS", scheme: "https"},
	}
	for _, c := range cases {
		for way, args := range map[string][]string{"transfer service": nil, "local": {"--local"}} {
			t.Run(c.name+", "+way, func(t *testing.T) {
				r := newRegistry(t)
				p := newProxy(t, r)
				n := newNode(t, harness.Options{})
				if err := n.AddRegistry(c.scheme, p.Host()); err != nil {
					t.Fatal(err)
				}
				im, ref := push(t, r, p.Host(), "fallback", small(30, 8<<20))
				p.SetRule(c.rule)
				begin := time.Now()
				mustPull(t, n, "default", ref, append(c.args, args...)...)
				t.Logf("pulled in %s", time.Since(begin).Round(10*time.Millisecond))
				checkImage(t, n, "default", ref)
				mustRun(t, n, "default", ref, "30", "/helper", "cat", "/etc/seed")
				for i, l := range im.Layers {
					if got := p.BlobBytes()[l.Digest]["containerd"]; got != l.Size {
						t.Errorf("layer %d: containerd got %d bytes, want all %d", i, got, l.Size)
					}
				}
			})
		}
	}
}

// TestFallbackHalfway takes gantry's access away in the middle of a layer:
// containerd goes on from what is there, and the bytes are put together right.
func TestFallbackHalfway(t *testing.T) {
	needGantry(t)
	for way, args := range map[string][]string{"transfer service": nil, "local": {"--local"}} {
		t.Run(way, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			im, ref := push(t, r, p.Host(), "halfway", small(31, 64<<20))
			big := im.Layers[2]
			p.SetRule(func(r *http.Request) *harness.Fault {
				switch {
				case !fromGantry(r) || !isBlob(r):
					return nil
				case p.BlobBytes()[big.Digest][harness.Gantry] > big.Size/3:
					return &harness.Fault{Status: http.StatusForbidden}
				default:
					return &harness.Fault{CutAfter: 3 << 20}
				}
			})
			mustPull(t, n, "default", ref, args...)
			checkImage(t, n, "default", ref)
			mustRun(t, n, "default", ref, "31", "/helper", "cat", "/etc/seed")
			sent := p.BlobBytes()[big.Digest]
			t.Logf("of %d bytes %d went to gantry and %d to containerd", big.Size, sent[harness.Gantry], sent["containerd"])
			if sent["containerd"] == 0 || sent["containerd"] >= big.Size {
				t.Errorf("containerd was sent %d bytes of %d, want what gantry did not have", sent["containerd"], big.Size)
			}
			checkExported(t, n, ref)
		})
	}
}

// TestFallbackOfEight has eight clients side by side fetch what gantry may not: one of them does, for all.
func TestFallbackOfEight(t *testing.T) {
	needGantry(t)
	for name, share := range map[string]int64{"from the start": 0, "part-way": 8} {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			im, ref := push(t, r, p.Host(), "eight", small(32, 24<<20))
			big := im.Layers[2]
			p.SetRule(func(r *http.Request) *harness.Fault {
				slow := &harness.Fault{BytesPerSecond: 16 << 20}
				switch {
				case !fromGantry(r) || !isBlob(r):
					return slow
				case share == 0 || p.BlobBytes()[big.Digest][harness.Gantry] > big.Size/share:
					return &harness.Fault{Status: http.StatusForbidden}
				}
				slow.CutAfter = 512 << 10
				return slow
			})
			g, ctx := errgroup.WithContext(t.Context())
			for i := range 8 {
				g.Go(func() error { return n.PullClient(ctx, fmt.Sprintf("ns%d", i), ref) })
			}
			if err := g.Wait(); err != nil {
				t.Fatal(err)
			}
			for i, l := range im.Layers {
				got := p.BlobBytes()[l.Digest]["containerd"]
				t.Logf("layer %d: %d bytes, the clients got %d", i, l.Size, got)
				if share == 0 && got != l.Size || got > l.Size {
					t.Errorf("layer %d: the clients got %d bytes together, want %d once", i, got, l.Size)
				}
			}
			if got := p.BlobBytes()[big.Digest]["containerd"]; share > 0 && (got == 0 || got == big.Size) {
				t.Errorf("the clients got %d bytes of %d, want what gantry did not have", got, big.Size)
			}
			for i := range 8 {
				namespace := fmt.Sprintf("ns%d", i)
				checkImage(t, n, namespace, ref)
				mustRun(t, n, namespace, ref, "32", "/helper", "cat", "/etc/seed")
			}
		})
	}
}

// checkExported imports what was exported into another namespace and compares what a container reads there.
func checkExported(t *testing.T, n *harness.Node, ref string) {
	t.Helper()
	tar := mustExport(t, n, "default", ref)
	reference := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	if _, err := reference.Ctr(t.Context(), "default", "image", "import", tar); err != nil {
		t.Fatalf("import by containerd as shipped: %v", err)
	}
	want, err := reference.Run(t.Context(), "default", ref, "sum", "/helper", "sum", "/noise")
	if err != nil {
		t.Fatal(err)
	}
	mustRun(t, n, "default", ref, strings.TrimSpace(want), "/helper", "sum", "/noise")
}

// TestBadConnections breaks what a network breaks; the pull succeeds and gantry fetches all of it.
func TestBadConnections(t *testing.T) {
	needGantry(t)
	rules := map[string]harness.Rule{
		"cut":           func(*http.Request) *harness.Fault { return &harness.Fault{CutAfter: 5 << 20} },
		"range ignored": func(*http.Request) *harness.Fault { return &harness.Fault{IgnoreRange: true} },
		"latency":       func(*http.Request) *harness.Fault { return &harness.Fault{Latency: 200 * time.Millisecond} },
	}
	for name, rule := range rules {
		t.Run(name, func(t *testing.T) {
			n, r, p := setup(t, harness.Options{})
			_, ref := push(t, r, p.Host(), "bad", small(32, 24<<20))
			p.SetRule(func(r *http.Request) *harness.Fault {
				if fromGantry(r) && isBlob(r) {
					return rule(r)
				}
				return nil
			})
			mustPull(t, n, "default", ref)
			checkImage(t, n, "default", ref)
			mustRun(t, n, "default", ref, "32", "/helper", "cat", "/etc/seed")
		})
	}
}

// TestMirror fetches layers from the mirror that hosts.toml names first.
func TestMirror(t *testing.T) {
	needGantry(t)
	r := newRegistry(t)
	origin, mirror := newProxy(t, r), newProxy(t, r)
	n := newNode(t, harness.Options{})
	if err := n.AddRegistry("http", origin.Host(), mirror.Host()); err != nil {
		t.Fatal(err)
	}
	im, ref := push(t, r, origin.Host(), "mirrored", small(33, 8<<20))
	mustPull(t, n, "default", ref)
	checkImage(t, n, "default", ref)
	if got := mirror.SentTo(harness.Gantry); got != im.Size() {
		t.Errorf("the mirror sent %d bytes to gantry, want all %d", got, im.Size())
	}
}
