package harness

import (
	"cmp"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// storage is the host that blobs are redirected to: whoever brings a signature that
// has not expired gets the blob, and no login is asked for.
type storage struct {
	addr string
	key  []byte
	life time.Duration
}

func newStorage(o FaultOptions) *storage {
	return &storage{key: []byte(rand.Text()), life: cmp.Or(o.SignatureLife, time.Minute)}
}

// sign returns the link to a path.
func (s *storage) sign(path string) string {
	expires := strconv.FormatInt(time.Now().Add(s.life).UnixNano(), 10)
	q := url.Values{"expires": {expires}, "signature": {s.signature(path, expires)}}
	return "http://" + s.addr + path + "?" + q.Encode()
}

func (s *storage) signature(path, expires string) string {
	mac := hmac.New(sha256.New, s.key)
	mac.Write([]byte(path + "\n" + expires))
	return hex.EncodeToString(mac.Sum(nil))
}

// check returns the status to refuse the request with, or 0.
func (s *storage) check(r *http.Request) int {
	q := r.URL.Query()
	expires, err := strconv.ParseInt(q.Get("expires"), 10, 64)
	if err != nil || time.Now().UnixNano() > expires || !hmac.Equal([]byte(q.Get("signature")), []byte(s.signature(r.URL.Path, q.Get("expires")))) {
		return http.StatusForbidden
	}
	return 0
}
