package content

import (
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
)

// maxRef bounds the length of a ref in bytes. containerd's database cannot hold
// keys above 32 KiB, and a ref is written to disk before anything else.
const maxRef = 64 << 10

// digestFromRef returns the digest that ends ref, as in
// "default/1/layer-sha256:<hex>". Only the tail counts: an image's author
// chooses the text before it (a media type, a ref name).
func digestFromRef(ref string) (digest.Digest, bool) {
	i := strings.LastIndexByte(ref, ':')
	if i < 0 {
		return "", false
	}
	for _, alg := range []digest.Algorithm{digest.SHA256, digest.SHA384, digest.SHA512} {
		head, ok := strings.CutSuffix(ref[:i], alg.String())
		if !ok || !alg.Available() || (head != "" && isAlphanumeric(head[len(head)-1])) {
			continue
		}
		d := digest.NewDigestFromEncoded(alg, ref[i+1:])
		if d.Validate() == nil {
			return d, true
		}
	}
	return "", false
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

// splitRef takes containerd's "namespace/number/" off ref. A ref of another
// form is returned whole, with an empty namespace.
func splitRef(ref string) (namespace, rest string) {
	parts := strings.SplitN(ref, "/", 3)
	if len(parts) < 3 || parts[0] == "" || parts[2] == "" {
		return "", ref
	}
	if _, err := strconv.ParseUint(parts[1], 10, 64); err != nil {
		return "", ref
	}
	return parts[0], parts[2]
}

// ingestDir is the folder of a ref. The name is a hash of the ref, so it is one
// path element whatever the ref contains. It says nothing about the data.
func (s *Store) ingestDir(ref string) string {
	return filepath.Join(s.root, ingestFolder, digest.FromString(ref).Encoded())
}
