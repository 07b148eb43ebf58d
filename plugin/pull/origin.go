package pull

import (
	"context"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	digest "github.com/opencontainers/go-digest"
)

// distributionSource is the prefix of the labels in which containerd records,
// on the manifest, from which host and repositories it was pulled. The host
// has no port.
const distributionSource = "containerd.io/distribution.source."

// maxHints bounds how many image references learned from Prepare are kept.
const maxHints = 4096

// Containerd is what gantry asks of containerd's API.
type Containerd interface {
	// Labels returns the labels of a blob in a namespace, or errdefs.ErrNotFound
	// if the namespace does not have the blob.
	Labels(ctx context.Context, namespace string, d digest.Digest) (map[string]string, error)
}

// origin is a place that an image came from, as containerd itself recorded it.
type origin struct {
	host       string // with its port, if it is known
	repository string
}

func (o origin) String() string { return o.host + "/" + o.repository }

// hints remembers the image references that snapshot labels named. They carry
// the port that containerd's own record lacks. A label can be forged by whoever
// made the image, so a hint only ever refines an origin that containerd
// recorded; alone it counts for nothing.
type hints struct {
	mu   sync.Mutex
	refs map[hintKey]string
	old  []hintKey // in order of arrival
}

type hintKey struct {
	namespace string
	manifest  digest.Digest
}

// learn takes the labels of a Prepare.
func (h *hints) learn(namespace string, labels map[string]string) {
	ref := labels[snapshotters.TargetRefLabel]
	m := digest.Digest(labels[snapshotters.TargetManifestDigestLabel])
	if ref == "" || m.Validate() != nil {
		return
	}
	key := hintKey{namespace, m}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.refs == nil {
		h.refs = make(map[hintKey]string)
	}
	if _, ok := h.refs[key]; !ok {
		h.old = append(h.old, key)
	}
	h.refs[key] = ref
	if len(h.old) > maxHints {
		delete(h.refs, h.old[0])
		h.old = h.old[1:]
	}
}

func (h *hints) ref(namespace string, m digest.Digest) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.refs[hintKey{namespace, m}]
}

// forget drops what was learned for a pull that is over: the next one may come
// from another port.
func (h *hints) forget(namespace string, m digest.Digest) {
	key := hintKey{namespace, m}
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.refs, key)
	h.old = slices.DeleteFunc(h.old, func(k hintKey) bool { return k == key })
}

// anyRef is ref for whoever does not know the namespace: an empty one is any.
func (h *hints) anyRef(namespace string, m digest.Digest) string {
	if namespace != "" {
		return h.ref(namespace, m)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, key := range h.old {
		if key.manifest == m {
			return h.refs[key]
		}
	}
	return ""
}

// origins finds out where the manifest's namespace got it from. Only what
// containerd recorded counts; a hint adds the port. Without one, every port for
// which the registry configuration has a folder is an origin.
func (p *Puller) origins(ctx context.Context, namespace string, m *manifest) ([]origin, error) {
	labels, err := p.containerd.Labels(ctx, namespace, m.digest)
	if err != nil {
		return nil, fmt.Errorf("where manifest %s came from: %w", m.digest, err)
	}
	ref := p.hints.ref(namespace, m.digest)
	hint, hinted := parseRef(ref)
	hinted = hinted && p.catalog.honest(ref)
	var found []origin
	for _, key := range slices.Sorted(maps.Keys(labels)) {
		hostname, ok := strings.CutPrefix(key, distributionSource)
		if !ok || hostname == "" {
			continue
		}
		for repository := range strings.SplitSeq(labels[key], ",") {
			if repository == "" {
				continue
			}
			if hinted && hint.repository == repository && withoutPort(hint.host) == hostname {
				// Exactly what the pull named; nothing else needs to be guessed.
				return []origin{hint}, nil
			}
			for _, host := range p.registry.HostsFor(hostname) {
				found = append(found, origin{host, repository})
			}
		}
	}
	if len(found) == 0 {
		return nil, fmt.Errorf("manifest %s has no recorded source in namespace %s: %w", m.digest, namespace, errdefs.ErrNotFound)
	}
	return found, nil
}

// parseRef splits an image reference into host and repository.
func parseRef(ref string) (origin, bool) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return origin{}, false
	}
	host, repository, ok := strings.Cut(spec.Locator, "/")
	return origin{host, repository}, ok && host != "" && repository != ""
}

// withoutPort strips the port as containerd does when it records a source.
func withoutPort(host string) string {
	u, err := url.Parse("dummy://" + host)
	if err != nil {
		return host
	}
	return u.Hostname()
}
