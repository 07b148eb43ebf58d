package harness

import (
	"io"
	"reflect"
	"testing"
)

// An image is built once, and is the same when it is read from the cache.
func TestBuildCached(t *testing.T) {
	t.Setenv("GANTRY_CACHE", t.TempDir())
	builds := 0
	spec := ImageSpec{Layers: []LayerSpec{{Tar: func(w io.Writer) error {
		builds++
		return Entries(File("etc/motd", "hello\n"))(w)
	}}}}
	first, err := BuildCached(t.Context(), "motd-v1", spec)
	if err != nil {
		t.Fatal(err)
	}
	second, err := BuildCached(t.Context(), "motd-v1", spec)
	if err != nil {
		t.Fatal(err)
	}
	if builds != 1 || !reflect.DeepEqual(first, second) {
		t.Errorf("%d builds; first\n%+v\nsecond\n%+v", builds, first, second)
	}
	registry, err := StartFaultRegistry(t.Context(), FaultOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := registry.Close(); err != nil {
			t.Error(err)
		}
	}()
	registry.AddImage(second, "motd", "latest") // finds the blobs where they were moved to
	resp, err := send(t.Context(), "GET", "http://"+registry.Host()+"/v2/motd/manifests/latest", nil, nil, 0)
	if err != nil || resp.StatusCode != 200 || int64(len(resp.text)) != second.Manifest.Size {
		t.Errorf("manifest: %+v, %v", resp, err)
	}
}
