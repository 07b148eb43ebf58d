package harness

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Push uploads the image to the registry at host (plain HTTP) as
// <repository>:<tag> and returns that reference, host included. Blobs the
// repository has already are not sent again.
func (im *Image) Push(ctx context.Context, host, repository, tag string) (string, error) {
	base := "http://" + host + "/v2/" + repository
	for _, desc := range append([]ocispec.Descriptor{im.Config}, im.Layers...) {
		// A manifest that lies names blobs nobody has: the registry says so below, unless it was told not to look.
		if err := im.pushBlob(ctx, base, desc.Digest); err != nil {
			return "", fmt.Errorf("push blob %s: %w", desc.Digest, err)
		}
	}
	f, err := os.Open(im.path(im.Manifest.Digest))
	if err != nil {
		return "", err
	}
	defer f.Close()
	header := http.Header{"Content-Type": {im.Manifest.MediaType}}
	resp, err := send(ctx, http.MethodPut, base+"/manifests/"+tag, header, f, im.Manifest.Size)
	if err != nil {
		return "", err
	}
	if resp.StatusCode != http.StatusCreated {
		return "", fmt.Errorf("push %s/%s:%s: %s: %s", host, repository, tag, resp.Status, resp.text)
	}
	return host + "/" + repository + ":" + tag, nil
}

func (im *Image) pushBlob(ctx context.Context, base string, dgst digest.Digest) error {
	resp, err := send(ctx, http.MethodHead, base+"/blobs/"+dgst.String(), nil, nil, 0)
	if err != nil || resp.StatusCode == http.StatusOK {
		return err
	}
	f, err := os.Open(im.path(dgst))
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	resp, err = send(ctx, http.MethodPost, base+"/blobs/uploads/", nil, nil, 0)
	if err != nil {
		return err
	}
	target, err := url.Parse(resp.Header.Get("Location"))
	if err != nil || resp.StatusCode != http.StatusAccepted {
		return fmt.Errorf("start of upload: %s: %s (%w)", resp.Status, resp.text, err)
	}
	q := target.Query()
	q.Set("digest", dgst.String())
	target.RawQuery = q.Encode()
	header := http.Header{"Content-Type": {"application/octet-stream"}}
	resp, err = send(ctx, http.MethodPut, target.String(), header, f, info.Size())
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusCreated {
		return fmt.Errorf("upload: %s: %s", resp.Status, resp.text)
	}
	return nil
}

// reply is a response whose body has been read.
type reply struct {
	*http.Response
	text string
}

func send(ctx context.Context, method, url string, header http.Header, body io.Reader, size int64) (*reply, error) {
	if body == nil {
		body = http.NoBody
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return nil, err
	}
	req.ContentLength = size
	req.Header = http.Header{"User-Agent": {"gantry-test/1"}}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	return &reply{Response: resp, text: string(text)}, err
}
