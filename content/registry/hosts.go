package registry

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"sync"
	"time"
	"weak"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

const (
	// maxHeader bounds the header of a reply, in bytes.
	maxHeader = 64 << 10
	// maxIdle is how many connections to one host wait for the next range. Go
	// keeps two, and would dial anew for almost every range beyond.
	maxIdle = 64
	// maxDial bounds a dial_timeout of hosts.toml.
	maxDial = 30 * time.Second
	// maxRepositories bounds the token caches of an endpoint.
	maxRepositories = 256
)

// hostSet is what the hosts files say about one host of image names.
type hostSet struct {
	dir, files string // where it was read, and what the files looked like
	used       uint64
	endpoints  []*endpoint
	transports []*http.Transport
}

// closeIdle lets connections in use finish.
func (s *hostSet) closeIdle() {
	for _, t := range s.transports {
		t.CloseIdleConnections()
	}
}

// loadHostSet lets containerd's own package read the folder, so that gantry and
// containerd agree on every host, and keeps the hosts that may serve pulls.
func loadHostSet(ctx context.Context, host, dir string, o Options) (*hostSet, error) {
	set := &hostSet{dir: dir}
	hosts, err := config.ConfigureHosts(ctx, config.HostOptions{
		HostDir:      func(string) (string, error) { return dir, nil },
		UpdateClient: set.prepare(o),
	})(host)
	if err != nil {
		return nil, fmt.Errorf("hosts files in %s cannot be used: %w: %w", dir, errdefs.ErrFailedPrecondition, err)
	}
	seen := map[string]*endpoint{}
	for _, rh := range hosts {
		if rh.Scheme != "http" && rh.Scheme != "https" || rh.Host == "" {
			return nil, fmt.Errorf("hosts files in %s: %q is not an http or https URL of a host: %w", dir, rh.Scheme+"://"+rh.Host, errdefs.ErrFailedPrecondition)
		}
		place := rh.Scheme + "://" + rh.Host + rh.Path
		if !rh.Capabilities.Has(docker.HostCapabilityPull) {
			continue
		}
		if ep := seen[place]; ep != nil {
			ep.capabilities |= rh.Capabilities
			continue
		}
		ep := newEndpoint(host, rh, o)
		if last := hosts[len(hosts)-1]; ep.proxies == "" || place == last.Scheme+"://"+last.Host+last.Path {
			ep.tier = 1 // containerd puts the server itself last
		}
		seen[place] = ep
		set.endpoints = append(set.endpoints, ep)
	}
	return set, nil
}

// prepare sets up each transport that containerd's package makes. It is called
// for the first client and then for each host with settings of its own, whose
// transport is a clone of the first; a host may share the first client.
//
// HTTP/2 stays off: it would put all ranges of a host on one TCP connection,
// where one lost packet stops them all, one congestion window and one
// per-connection rate limit hold for all (25 MB/s instead of 250 for ten
// ranges on the object stores that limit so), and Go's fixed flow-control
// window of 4 MiB a stream caps the rate at high latency. Blobs are few large
// replies: there is nothing to win from multiplexing.
func (s *hostSet) prepare(o Options) config.UpdateClientFunc {
	return func(c *http.Client) error {
		t, ok := c.Transport.(*http.Transport)
		if !ok {
			return nil // the first client again, prepared before
		}
		if len(s.transports) == 0 {
			t.DialContext = (&net.Dialer{Timeout: o.DialTimeout, KeepAlive: 30 * time.Second}).DialContext
			t.Protocols = new(http.Protocols)
			t.Protocols.SetHTTP1(true)
			t.TLSHandshakeTimeout = o.DialTimeout
			t.ResponseHeaderTimeout = o.StallTimeout
			t.MaxResponseHeaderBytes = maxHeader
			t.MaxIdleConns = 4 * maxIdle
			t.MaxIdleConnsPerHost = maxIdle
			t.DisableCompression = true // a blob's bytes are wanted as they are
		} else {
			t.DialContext = boundDial(t.DialContext)
		}
		t.TLSClientConfig.ClientSessionCache = tls.NewLRUClientSessionCache(maxIdle)
		s.transports = append(s.transports, t)
		c.Transport = guard{t}
		return nil
	}
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

func boundDial(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, maxDial)
		defer cancel()
		return dial(ctx, network, addr)
	}
}

// endpoint is one host that may serve pulls: a mirror or the registry itself.
type endpoint struct {
	name               string // for logs and errors
	scheme, host, path string
	proxies            string // the host it stands for, if it is a mirror
	tier               int    // 0 for a mirror, 1 for the server itself
	capabilities       docker.HostCapabilities
	header             http.Header
	transport          http.RoundTripper
	policy             *policy
	opts               Options

	mu      sync.Mutex
	auth    map[string]*auth // by repository
	sources map[blobKey]weak.Pointer[Source]
}

// blobKey names a blob on an endpoint.
type blobKey struct {
	repository string
	digest     digest.Digest
	size       int64
	manifest   bool // it is served as a manifest is
}

func newEndpoint(asked string, rh docker.RegistryHost, o Options) *endpoint {
	_, guarded := rh.Client.Transport.(guard)
	header := http.Header{}
	for key, values := range rh.Header { // keys are as spelled in the file
		for _, v := range values {
			header.Add(key, v)
		}
	}
	ep := &endpoint{
		name:         rh.Host,
		scheme:       rh.Scheme,
		host:         rh.Host,
		path:         rh.Path,
		capabilities: rh.Capabilities,
		header:       header,
		transport:    asking{rh.Client.Transport},
		policy:       &policy{host: rh.Host, plain: mayBePlain(rh, !guarded), header: header},
		opts:         o,
		auth:         map[string]*auth{},
		sources:      map[blobKey]weak.Pointer[Source]{},
	}
	if rh.Path != "/v2" {
		ep.name += rh.Path // one machine may stand for several registries
	}
	if rh.Host != asked && (asked != "docker.io" || rh.Host != "registry-1.docker.io") {
		ep.proxies = asked
	}
	return ep
}

// source returns the one Source of a blob, which exists as long as somebody has
// it: all who fetch the blob share the place that the host points to.
func (ep *endpoint) source(key blobKey) (*Source, error) {
	a := ep.authFor(key.repository)
	ep.mu.Lock()
	defer ep.mu.Unlock()
	if s := ep.sources[key].Value(); s != nil {
		return s, nil
	}
	s, err := newSource(ep, a, key)
	if err != nil {
		return nil, err
	}
	ep.sources[key] = weak.Make(s)
	runtime.AddCleanup(s, ep.dropSource, key)
	return s, nil
}

// dropSource is called when the last one who had a Source is gone.
func (ep *endpoint) dropSource(key blobKey) {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	if ep.sources[key].Value() == nil { // else there is a new one
		delete(ep.sources, key)
	}
}

// authFor returns the tokens of a repository. Each has its own: an authorizer
// asks for all scopes it has ever seen, which would tell the token server of
// one image about the repositories of others.
func (ep *endpoint) authFor(repository string) *auth {
	ep.mu.Lock()
	defer ep.mu.Unlock()
	a, ok := ep.auth[repository]
	if !ok {
		if len(ep.auth) >= maxRepositories {
			clear(ep.auth)
		}
		a = newAuth(ep, repository)
		ep.auth[repository] = a
	}
	return a
}
