package harness

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// Registry is a distribution registry on a loopback port, storing under the
// folder it was started in.
type Registry struct {
	addr string
	proc *Process
}

const registryConfig = `version: 0.1
log: {level: info, formatter: json}
storage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}}
http: {addr: %q}
`

// StartRegistry starts a registry that keeps its data and logs in dir, and waits until it answers.
func StartRegistry(ctx context.Context, dir string) (*Registry, error) {
	program, err := Program("registry")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	addr, err := freeAddress(ctx)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, registryConfig, filepath.Join(dir, "data"), addr), 0o600); err != nil {
		return nil, err
	}
	proc, err := start(ctx, dir, "registry", []string{"OTEL_TRACES_EXPORTER=none"}, program, "serve", config)
	if err != nil {
		return nil, err
	}
	r := &Registry{addr: addr, proc: proc}
	if err := proc.ready(ctx, r.ping); err != nil {
		proc.Kill()
		return nil, err
	}
	return r, nil
}

// freeAddress returns a loopback address nobody listens on. The registry cannot
// be handed a socket, so somebody else could take the port in between; the start fails then.
func freeAddress(ctx context.Context) (string, error) {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp4", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func (r *Registry) ping(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.addr+"/v2/", http.NoBody)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Host returns the address, host:port, as it stands in image references.
func (r *Registry) Host() string { return r.addr }

// PID returns the registry's process id.
func (r *Registry) PID() int { return r.proc.PID() }

// Close stops the registry; its folder stays.
func (r *Registry) Close() error { return r.proc.Stop() }

// Access is one request the registry answered, from its own log.
type Access struct {
	Time      time.Time
	Method    string
	Path      string
	UserAgent string
	Status    int
	Bytes     int64 // of the reply's body that were written
}

// Client returns the User-Agent up to its first slash: who asked.
func (a Access) Client() string { return clientName(a.UserAgent) }

// Blob returns the digest of the blob the path names, if it does.
func (a Access) Blob() (digest.Digest, bool) { return blobOf(a.Path) }

// Manifest says whether the path is a manifest's.
func (a Access) Manifest() bool { return strings.Contains(a.Path, "/manifests/") }

func clientName(userAgent string) string {
	name, _, _ := strings.Cut(userAgent, "/")
	return name
}

var blobPath = regexp.MustCompile(`^/v2/.+/blobs/(sha256:[0-9a-f]{64})$`)

func blobOf(path string) (digest.Digest, bool) {
	m := blobPath.FindStringSubmatch(path)
	if m == nil {
		return "", false
	}
	return digest.Digest(m[1]), true
}

// logLine has the fields of the registry's JSON log that Access is made of.
type logLine struct {
	Message   string    `json:"msg"`
	Time      time.Time `json:"time"`
	Method    string    `json:"http.request.method"`
	URI       string    `json:"http.request.uri"`
	UserAgent string    `json:"http.request.useragent"`
	Status    int       `json:"http.response.status"`
	Written   int64     `json:"http.response.written"`
}

// Accesses parses the registry's log: every request that was answered, in order.
func (r *Registry) Accesses() ([]Access, error) {
	f, err := os.Open(r.proc.Log())
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []Access
	s := bufio.NewScanner(f)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		var l logLine
		if json.Unmarshal(s.Bytes(), &l) != nil || !strings.HasPrefix(l.Message, "response completed") {
			continue
		}
		path, _, _ := strings.Cut(l.URI, "?")
		all = append(all, Access{Time: l.Time, Method: l.Method, Path: path, UserAgent: l.UserAgent, Status: l.Status, Bytes: l.Written})
	}
	return all, s.Err()
}
