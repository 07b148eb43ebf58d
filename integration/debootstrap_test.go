package integration

import (
	"io"
	"os"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// TestDebian pulls, runs and compares what debootstrap and apt make of two of Debian's releases, each by another way: a
// minimal system, and a layer for each of several changes to it, as a build would have them.
func TestDebian(t *testing.T) {
	r := newRegistry(t)
	ours := newNode(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs, Root: harness.Tmpfs})
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	for suite, way := range map[string]struct {
		version, namespace string
		args               []string
	}{"bookworm": {"12", "transfer", nil}, "trixie": {"13", "local", []string{"--local"}}} {
		t.Run(suite, func(t *testing.T) {
			tars, err := harness.DebianTars(t.Context(), suite)
			if err != nil {
				t.Fatal(err)
			}
			spec := harness.ImageSpec{Config: ocispec.ImageConfig{Env: []string{"PATH=/usr/bin:/usr/sbin:/bin:/sbin"}}}
			for _, tar := range tars {
				spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: func(w io.Writer) error { return copyFile(w, tar) }, Compression: harness.GzipFast})
			}
			spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Entries(harness.File("etc/gantry", "over Debian"), harness.File("usr/share/.wh.common-licenses", ""))})
			im, ref := push(t, r, r.Host(), "debian-"+suite, spec)
			compareWays(t, map[string][]string{way.namespace: way.args}, ours, theirs, im, ref)
			mustRun(t, ours, way.namespace, ref, "over Debian "+way.version, "/bin/sh", "-c", `. /etc/os-release; echo "$(cat /etc/gantry) $VERSION_ID"`)
			got, err := ours.Run(t.Context(), way.namespace, ref, "dpkg-"+suite, "/bin/sh", "-c", "! dpkg --verify dpkg bash coreutils | grep -v /usr/share/doc && dpkg-query -W python3-minimal && python3 -c 'print(1+1)'")
			if err != nil || !strings.HasPrefix(got, "python3-minimal") || !strings.HasSuffix(got, "\n2\n") {
				t.Errorf("dpkg and python in the container: %q (%v)", got, err)
			}
		})
	}
}

func copyFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}
