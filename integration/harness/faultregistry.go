package harness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// FaultOptions say what a FaultRegistry is like for everybody; a [Rule] adds what goes wrong with single requests.
type FaultOptions struct {
	PerConnection int64         // bytes a second on each connection; 0: what loopback gives
	Total         int64         // bytes a second on all together; 0: the same
	Latency       time.Duration // before each answer

	Basic     string        // ask for this "user:secret"
	Bearer    bool          // ask for tokens, that a server of its own gives out (to Basic's user, if that is set)
	TokenLife time.Duration // default a minute

	Redirect      bool          // blobs lie on a host of their own, reached by links that expire
	SignatureLife time.Duration // of those links; default a minute
}

// FaultRegistry is a registry that can be told what to get wrong, on TCP ports
// of the loopback interface. It serves images from the folders they were built in.
//
// [FaultRegistry.Sent] counts what was written to its sockets; their send buffers hold 64 KiB.
type FaultRegistry struct {
	faultServer
	options FaultOptions
	addr    string
	tokens  *tokenServer // nil: without
	storage *storage     // nil: without

	images    sync.Mutex        // guards what follows
	manifests map[string]stored // by repository and tag or digest, as in the path
	blobs     map[digest.Digest]stored
}

// stored is a manifest or blob.
type stored struct {
	path      string
	mediaType string
	digest    digest.Digest
	size      int64
}

// StartFaultRegistry starts a registry without images. The caller closes it.
func StartFaultRegistry(ctx context.Context, o FaultOptions) (*FaultRegistry, error) {
	f := &FaultRegistry{
		faultServer: faultServer{perConnection: o.PerConnection, total: newBucket(o.Total), latency: o.Latency},
		options:     o, manifests: map[string]stored{}, blobs: map[digest.Digest]stored{},
	}
	err := f.start(ctx)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (f *FaultRegistry) start(ctx context.Context) (err error) {
	if f.addr, err = f.listen(ctx, f.answer); err != nil {
		return err
	}
	if f.options.Bearer {
		f.tokens = newTokenServer(f.options)
		if f.tokens.addr, err = f.listen(ctx, f.tokens.answer); err != nil {
			return err
		}
	}
	if f.options.Redirect {
		f.storage = newStorage(f.options)
		f.storage.addr, err = f.listen(ctx, func(w http.ResponseWriter, r *http.Request, x *exchange) {
			if status := f.storage.check(r); status != 0 {
				x.answer(w, status)
				return
			}
			f.sendBlob(w, r, x)
		})
	}
	return err
}

// Host returns the address, host:port, as it stands in image references.
func (f *FaultRegistry) Host() string { return f.addr }

// StorageHost returns the address that blobs are redirected to, "" without FaultOptions.Redirect.
func (f *FaultRegistry) StorageHost() string {
	if f.storage == nil {
		return ""
	}
	return f.storage.addr
}

// TokenHost returns the address of the token server, "" without FaultOptions.Bearer.
func (f *FaultRegistry) TokenHost() string {
	if f.tokens == nil {
		return ""
	}
	return f.tokens.addr
}

// AddImage makes the registry serve the image as repository:tag, from the folder
// it was built in, and returns that reference, host included.
func (f *FaultRegistry) AddImage(im *Image, repository, tag string) string {
	f.images.Lock()
	defer f.images.Unlock()
	for _, desc := range append(im.Layers[:len(im.Layers):len(im.Layers)], im.Config) {
		f.blobs[desc.Digest] = stored{im.path(desc.Digest), "application/octet-stream", desc.Digest, desc.Size}
	}
	m := stored{im.path(im.Manifest.Digest), im.Manifest.MediaType, im.Manifest.Digest, im.Manifest.Size}
	f.manifests[repository+"/manifests/"+tag] = m
	f.manifests[repository+"/manifests/"+m.digest.String()] = m
	return f.addr + "/" + repository + ":" + tag
}

var repositoryPath = regexp.MustCompile(`^/v2/(.+)/(?:manifests|blobs)/[^/]+$`)

// answer is for requests to the registry itself.
func (f *FaultRegistry) answer(w http.ResponseWriter, r *http.Request, x *exchange) {
	var repository string
	if m := repositoryPath.FindStringSubmatch(r.URL.Path); m != nil {
		repository = m[1]
	}
	if !f.admit(w, r, repository) {
		x.answer(w, http.StatusUnauthorized)
		return
	}
	if dgst, ok := blobOf(r.URL.Path); ok && f.storage != nil && f.has(dgst) {
		w.Header().Set("Location", f.storage.sign(r.URL.Path))
		x.answer(w, http.StatusTemporaryRedirect)
		return
	}
	switch {
	case r.URL.Path == "/v2/":
		x.answer(w, http.StatusOK)
	case strings.Contains(r.URL.Path, "/blobs/"):
		f.sendBlob(w, r, x)
	default:
		f.images.Lock()
		m, ok := f.manifests[strings.TrimPrefix(r.URL.Path, "/v2/")]
		f.images.Unlock()
		f.send(w, r, x, m, ok)
	}
}

func (f *FaultRegistry) has(dgst digest.Digest) bool {
	f.images.Lock()
	defer f.images.Unlock()
	_, ok := f.blobs[dgst]
	return ok
}

func (f *FaultRegistry) sendBlob(w http.ResponseWriter, r *http.Request, x *exchange) {
	dgst, _ := blobOf(r.URL.Path)
	f.images.Lock()
	b, ok := f.blobs[dgst]
	f.images.Unlock()
	f.send(w, r, x, b, ok)
}

// send answers with the part of s that was asked for, or what the fault makes of it.
func (f *FaultRegistry) send(w http.ResponseWriter, r *http.Request, x *exchange, s stored, ok bool) {
	if !ok {
		x.answer(w, http.StatusNotFound)
		return
	}
	off, n, status := x.part(r.Header.Get("Range"), s.size)
	h := w.Header()
	h.Set("Content-Type", s.mediaType)
	h.Set("Docker-Content-Digest", s.digest.String())
	h.Set("Accept-Ranges", "bytes")
	h.Set("Content-Length", strconv.FormatInt(n, 10))
	if status == http.StatusPartialContent {
		h.Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, off+n-1, s.size))
	}
	x.answer(w, status)
	if r.Method == http.MethodHead || n == 0 {
		return
	}
	if err := x.copy(r.Context(), w, s.path, off, n); err != nil {
		// The connection cannot be used again: the client waits for the rest.
		panic(http.ErrAbortHandler)
	}
}

// part returns what is to be sent of a blob of size bytes, and under which status.
func (x *exchange) part(header string, size int64) (off, n int64, status int) {
	first, last, ok := strings.Cut(strings.TrimPrefix(header, "bytes="), "-")
	off, err := strconv.ParseInt(first, 10, 64)
	if !ok || err != nil || x.fault.IgnoreRange {
		return 0, size, http.StatusOK
	}
	end := size
	if last != "" {
		if end, err = strconv.ParseInt(last, 10, 64); err != nil {
			return 0, size, http.StatusOK
		}
		end = min(end+1, size)
	}
	if off >= size || off >= end {
		return 0, 0, http.StatusRequestedRangeNotSatisfiable
	}
	n = end - off
	if x.fault.Short206 {
		n = (n + 1) / 2
	}
	if x.fault.WrongRange != 0 {
		off = min(max(off+x.fault.WrongRange, 0), size-1)
		n = min(n, size-off)
	}
	return off, n, http.StatusPartialContent
}

// copy sends n bytes of the file at path. The kernel does it where no byte is to be changed.
func (x *exchange) copy(ctx context.Context, w http.ResponseWriter, path string, off, n int64) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	if _, err := file.Seek(off, io.SeekStart); err != nil {
		return err
	}
	// What happens after so many bytes happens after they were sent: net/http holds little ones back.
	flush := http.NewResponseController(w).Flush
	for n > 0 {
		room, err := x.room(ctx, n)
		if err != nil {
			return err
		}
		var to io.Writer = w
		if x.fault.Corrupt != nil {
			to = &corrupting{w, x.fault.Corrupt, off + x.sent}
		}
		sent, err := io.CopyN(to, file, room)
		if err = errors.Join(err, flush(), x.went(ctx, sent)); err != nil {
			return err
		}
		n -= sent
	}
	return nil
}

// corrupting changes what is written before it is.
type corrupting struct {
	io.Writer
	change func(p []byte, off int64)
	off    int64
}

func (c *corrupting) Write(p []byte) (int, error) {
	c.change(p, c.off)
	c.off += int64(len(p))
	return c.Writer.Write(p)
}
