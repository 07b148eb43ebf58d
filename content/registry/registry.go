// Package registry knows where the bytes of a blob are: which hosts serve a
// repository (containerd's hosts.toml, mirrors first), how to prove who asks,
// and what a reply to a range request must look like.
//
// It keeps no bytes and retries nothing. [Source.Open] is one attempt at one
// host; what it returns says whether another attempt can help:
//
//   - errdefs.ErrUnavailable: not reached, reset, stalled, 429, 5xx. Worth a
//     retry, after RetryAfter() if the error has that method.
//   - errdefs.ErrNotFound, ErrUnauthenticated, ErrPermissionDenied: final for
//     this source.
//   - errdefs.ErrFailedPrecondition: the host breaks the rules (wrong
//     Content-Range, wrong size, a certificate nobody vouches for). Final too.
//
// Names of hosts and repositories may come from labels that anybody can write,
// replies from hosts that lie; both are checked here. Certificates, headers and
// mirrors come from the administrator's files and are believed, but a file that
// cannot be read as a whole is an error, never half a configuration.
package registry

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	digest "github.com/opencontainers/go-digest"
)

// Defaults of Options.
const (
	DefaultDialTimeout  = 5 * time.Second
	DefaultStallTimeout = 30 * time.Second
	DefaultTokenTimeout = 15 * time.Second
	DefaultUserAgent    = "gantry"
)

// Options of a Registry. Zero values mean the defaults.
type Options struct {
	// ConfigPath is containerd's config_path: one certs.d folder, or several
	// separated by colons, of which the first that knows a host wins. Empty:
	// every host is its own only source, over https.
	ConfigPath string
	// UserAgent is sent unless hosts.toml sets another one for a host.
	UserAgent string
	// Credentials answers with the user and secret for a host that asks for
	// them; an empty user with a secret is an identity token, two empty strings
	// are nobody. It is never called before a host asks. Nil: nobody.
	Credentials func(host string) (user, secret string, err error)
	// DialTimeout bounds connecting, and the TLS handshake once more. A
	// dial_timeout in hosts.toml goes before it.
	DialTimeout time.Duration
	// StallTimeout is how long a host may send nothing: before the reply's
	// header, and at any point of the body.
	StallTimeout time.Duration
	// TokenTimeout bounds the request to a token server as a whole.
	TokenTimeout time.Duration
}

func (o Options) withDefaults() Options {
	if o.UserAgent == "" {
		o.UserAgent = DefaultUserAgent
	}
	if o.DialTimeout <= 0 {
		o.DialTimeout = DefaultDialTimeout
	}
	if o.StallTimeout <= 0 {
		o.StallTimeout = DefaultStallTimeout
	}
	if o.TokenTimeout <= 0 {
		o.TokenTimeout = DefaultTokenTimeout
	}
	return o
}

// Registry finds the sources of blobs. It is safe for concurrent use.
type Registry struct {
	opts  Options
	roots []string

	mu    sync.Mutex
	hosts map[string]*hostSet // by the host of an image's name
	clock uint64              // counts uses, to find the least recent one
}

// maxHostSets bounds the connections and tokens that are kept: names come from
// labels, so there is no natural bound.
const maxHostSets = 128

// New returns a Registry. It reads and connects to nothing.
func New(o Options) *Registry {
	r := &Registry{opts: o.withDefaults(), hosts: map[string]*hostSet{}}
	for _, root := range filepath.SplitList(o.ConfigPath) {
		if root != "" {
			r.roots = append(r.roots, root)
		}
	}
	return r
}

// Close closes the idle connections. Sources that are in use stay usable.
func (r *Registry) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	for name, set := range r.hosts {
		set.closeIdle()
		delete(r.hosts, name)
	}
	return nil
}

// Sources returns the places of a blob in the order in which hosts.toml wants
// them tried, the host itself last. It makes no connection. A blob that
// somebody has the sources of already gets the same ones, to compare with ==.
//
// A host or repository that is no valid name, a digest that is none, and a
// negative size are errdefs.ErrInvalidArgument; hosts files that cannot be used
// are ErrFailedPrecondition, naming the file; no host that may serve pulls is
// ErrNotFound.
func (r *Registry) Sources(ctx context.Context, host, repository string, d digest.Digest, size int64) ([]*Source, error) {
	return r.sources(ctx, host, blobKey{repository: repository, digest: d, size: size})
}

// ManifestSources is Sources for a manifest or an index, which registries serve by another path than blobs.
func (r *Registry) ManifestSources(ctx context.Context, host, repository string, d digest.Digest, size int64) ([]*Source, error) {
	return r.sources(ctx, host, blobKey{repository: repository, digest: d, size: size, manifest: true})
}

func (r *Registry) sources(ctx context.Context, host string, key blobKey) ([]*Source, error) {
	repository, d, size := key.repository, key.digest, key.size
	if err := validName(host, repository); err != nil {
		return nil, err
	}
	if err := d.Validate(); err != nil {
		return nil, fmt.Errorf("digest %.100q: %w: %w", string(d), errdefs.ErrInvalidArgument, err)
	}
	if size < 0 {
		return nil, fmt.Errorf("blob %s: size %d: %w", d, size, errdefs.ErrInvalidArgument)
	}
	set, err := r.hostSet(ctx, host)
	if err != nil {
		return nil, err
	}
	var sources []*Source
	for _, ep := range set.endpoints {
		s, err := ep.source(key)
		if err != nil {
			return nil, err
		}
		sources = append(sources, s)
	}
	if len(sources) == 0 {
		return nil, fmt.Errorf("blob %s: the hosts file in %s allows no host to serve pulls of %s: %w", d, set.dir, host, errdefs.ErrNotFound)
	}
	return sources, nil
}

// hostSet returns what is configured for host, read again if a file changed.
func (r *Registry) hostSet(ctx context.Context, host string) (*hostSet, error) {
	dir, err := r.hostDir(host)
	if err != nil {
		return nil, err
	}
	files, err := checkHostDir(dir)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.clock++
	old := r.hosts[host]
	if old != nil && old.dir == dir && old.files == files {
		old.used = r.clock
		return old, nil
	}
	set, err := loadHostSet(ctx, host, dir, r.opts)
	if err != nil {
		return nil, err
	}
	if old != nil {
		old.closeIdle()
	} else if len(r.hosts) >= maxHostSets {
		r.evict()
	}
	set.files, set.used = files, r.clock
	r.hosts[host] = set
	return set, nil
}

// evict drops the set that was not used for longest. Called with mu held.
func (r *Registry) evict() {
	var oldest string
	for name, set := range r.hosts {
		if oldest == "" || set.used < r.hosts[oldest].used {
			oldest = name
		}
	}
	r.hosts[oldest].closeIdle()
	delete(r.hosts, oldest)
}

// HostsFor returns every "host[:port]" that hostname may mean: the labels in
// which containerd notes where an image came from carry no port. That is the
// name itself, and each folder for it among the hosts files, in both spellings
// ("name:port" and "name_port_"). Nothing for what is no host name.
func (r *Registry) HostsFor(hostname string) []string {
	if ip := net.ParseIP(hostname); ip != nil && strings.Contains(hostname, ":") {
		hostname = "[" + hostname + "]" // labels have IPv6 without brackets
	}
	if !isHost(hostname) {
		return nil
	}
	var found []string
	for _, root := range r.roots {
		// A folder that is missing or cannot be read names no ports.
		entries, _ := os.ReadDir(root)
		for _, e := range entries {
			if port, ok := portOfFolder(e.Name(), hostname); ok {
				found = append(found, hostname+":"+port)
			}
		}
	}
	slices.Sort(found)
	return append([]string{hostname}, slices.Compact(found)...)
}

// portOfFolder reads the port from a certs.d folder's name.
func portOfFolder(folder, hostname string) (string, bool) {
	rest, ok := strings.CutPrefix(folder, hostname)
	if !ok || len(rest) < 2 {
		return "", false
	}
	port := rest[1:]
	switch rest[0] {
	case ':':
	case '_':
		if port, ok = strings.CutSuffix(port, "_"); !ok {
			return "", false
		}
	default:
		return "", false
	}
	n, err := strconv.ParseUint(port, 10, 16)
	return port, err == nil && n > 0
}

var hostPattern = regexp.MustCompile(`\A(?:` + reference.DomainRegexp.String() + `)\z`)

// isHost says whether s is a host name or address, with or without a port.
func isHost(s string) bool { return len(s) <= 255 && hostPattern.MatchString(s) }

// validName refuses whatever could leave its place in a path, a URL or a token
// scope.
func validName(host, repository string) error {
	if !isHost(host) {
		return fmt.Errorf("registry host %.100q is not a valid name: %w", host, errdefs.ErrInvalidArgument)
	}
	named, err := reference.WithName(host + "/" + repository)
	if err != nil {
		return fmt.Errorf("repository %.300q of %s is not a valid name: %w: %w", repository, host, errdefs.ErrInvalidArgument, err)
	}
	if reference.Domain(named) != host || reference.Path(named) != repository {
		return fmt.Errorf("repository %.300q of %s is not a valid name: %w", repository, host, errdefs.ErrInvalidArgument)
	}
	return nil
}

// blobURL is where an endpoint has a blob. Mirrors are told which registry they
// stand for, the way containerd tells them.
func blobURL(ep *endpoint, key blobKey) *url.URL {
	kind := "blobs"
	if key.manifest {
		kind = "manifests"
	}
	u := &url.URL{Scheme: ep.scheme, Host: ep.host, Path: path.Join("/", ep.path, key.repository, kind, key.digest.String())}
	if ep.proxies != "" {
		u.RawQuery = url.Values{"ns": {ep.proxies}}.Encode()
	}
	return u
}

// mayBePlain says whether hosts.toml or the rule for localhost allows http.
func mayBePlain(rh docker.RegistryHost, fallback bool) bool {
	return rh.Scheme == "http" || fallback || docker.IsLocalhost(rh.Host)
}
