package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/archive"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// TestDebian pulls, runs and compares what debootstrap and apt make of two of Debian's releases: a minimal system, and a
// layer for each of several changes to it, as a build would have them.
func TestDebian(t *testing.T) {
	r := newRegistry(t)
	ours := newNode(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	for suite, version := range map[string]string{"bookworm": "12", "trixie": "13"} {
		t.Run(suite, func(t *testing.T) {
			spec := harness.ImageSpec{Config: ocispec.ImageConfig{Env: []string{"PATH=/usr/bin:/usr/sbin:/bin:/sbin"}}}
			for _, tar := range debianTars(t, suite) {
				spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: func(w io.Writer) error { return copyFile(w, tar) }, Compression: harness.GzipFast})
			}
			spec.Layers = append(spec.Layers, harness.LayerSpec{Tar: harness.Entries(harness.File("etc/gantry", "over Debian"), harness.File("usr/share/.wh.common-licenses", ""))})
			im, ref := push(t, r, r.Host(), "debian-"+suite, spec)
			compareTrees(t, ours, theirs, im, ref)
			mustRun(t, ours, "transfer", ref, "over Debian "+version, "/bin/sh", "-c", `. /etc/os-release; echo "$(cat /etc/gantry) $VERSION_ID"`)
			got, err := ours.Run(t.Context(), "local", ref, "dpkg-"+suite, "/bin/sh", "-c", "! dpkg --verify dpkg bash coreutils | grep -v /usr/share/doc && dpkg-query -W python3-minimal && python3 -c 'print(1+1)'")
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

// debianSteps are what a build would run on the minimal system, each for a layer of its own. The last one takes away and
// replaces much of what the others brought.
var debianSteps = []string{
	`echo 'Acquire::GzipIndexes "true"; Dir::Cache { pkgcache ""; srcpkgcache ""; };' > /etc/apt/apt.conf.d/90small; ` +
		"apt-get update -q && apt-get install -qy --no-install-recommends less ca-certificates && apt-get clean",
	"apt-get install -qy --no-install-recommends python3-minimal && apt-get clean",
	"apt-get purge -qy less && rm -rf /var/lib/apt/lists /usr/share/doc && ln -sfn info /usr/share/doc && rm -rf /var/log && mkdir -m 2775 /var/log && touch /var/log/new",
}

// debianTars returns the layers of a Debian, lowest first, made once and kept in the cache.
func debianTars(t *testing.T, suite string) []string {
	t.Helper()
	cache, err := harness.Cache()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "debian")
	tars, missing := []string{filepath.Join(dir, suite+"-minbase.tar")}, false
	for i := range debianSteps {
		tars = append(tars, filepath.Join(dir, fmt.Sprintf("%s-apt-%d.tar", suite, i+1)))
	}
	for _, tar := range tars {
		if _, err := os.Stat(tar); err != nil {
			missing = true
		}
	}
	if !missing {
		return tars
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := debianLayers(t.Context(), t.TempDir(), suite, tars); err != nil {
		t.Fatal(err)
	}
	return tars
}

// debianLayers makes the minimal system, and of each step what it changed in it, by containerd's own comparison.
func debianLayers(ctx context.Context, dir, suite string, tars []string) error {
	root, before := filepath.Join(dir, "root"), filepath.Join(dir, "before")
	if _, err := os.Stat(tars[0]); err != nil {
		if err := debootstrap(ctx, root, suite, tars[0]); err != nil {
			return err
		}
	} else if err := errors.Join(os.Mkdir(root, 0o755), command(ctx, "tar", "-C", root, "--xattrs", "--numeric-owner", "-xpf", tars[0])); err != nil {
		return err
	}
	for i, step := range debianSteps {
		for _, args := range [][]string{{"rm", "-rf", before}, {"cp", "-a", root, before}, {"chroot", root, "/bin/sh", "-ec", step}} {
			if err := command(ctx, args...); err != nil {
				return err
			}
		}
		if err := writeDiff(ctx, tars[i+1], before, root); err != nil {
			return err
		}
	}
	return nil
}

func writeDiff(ctx context.Context, path, before, after string) error {
	f, err := os.Create(path + ".part")
	if err != nil {
		return err
	}
	if err := errors.Join(archive.WriteDiff(ctx, f, before, after), f.Close()); err != nil {
		return err
	}
	return os.Rename(path+".part", path)
}

func debootstrap(ctx context.Context, root, suite, path string) error {
	for _, args := range [][]string{
		{"debootstrap", "--variant=minbase", suite, root},
		{"rm", "-rf", root + "/var/cache/apt/archives", root + "/var/lib/apt/lists"},
		{"tar", "-C", root, "--sort=name", "--xattrs", "--numeric-owner", "--one-file-system", "-cf", path + ".part", "."},
	} {
		if err := command(ctx, args...); err != nil {
			return err
		}
	}
	return os.Rename(path+".part", path)
}

func command(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, lastBytes(out, 2000))
	}
	return nil
}

func lastBytes(p []byte, n int) []byte { return bytes.TrimSpace(p[max(0, len(p)-n):]) }
