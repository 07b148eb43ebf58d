package integration

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// TestDebian pulls, runs and compares what `debootstrap --variant=minbase bookworm` makes.
func TestDebian(t *testing.T) {
	tar := debianTar(t)
	r := newRegistry(t)
	ours := newNode(t, harness.Options{})
	theirs := newNode(t, harness.Options{Snapshotter: harness.Overlayfs})
	if err := ours.AddRegistry("http", r.Host()); err != nil {
		t.Fatal(err)
	}
	im, ref := push(t, r, r.Host(), "debian", harness.ImageSpec{
		Layers: []harness.LayerSpec{
			{Tar: func(w io.Writer) error { return copyFile(w, tar) }},
			{Tar: harness.Entries(harness.File("etc/gantry", "over Debian"), harness.File("usr/share/.wh.common-licenses", ""))},
		},
		Config: ocispec.ImageConfig{Env: []string{"PATH=/usr/bin:/usr/sbin:/bin:/sbin"}},
	})
	compareTrees(t, ours, theirs, im, ref)
	mustRun(t, ours, "transfer", ref, "over Debian 12", "/bin/sh", "-c", `. /etc/os-release; echo "$(cat /etc/gantry) $VERSION_ID"`)
	got, err := ours.Run(t.Context(), "local", ref, "dpkg", "/bin/sh", "-c", "dpkg --verify dpkg bash coreutils && dpkg-query -W dpkg")
	if err != nil || !strings.HasPrefix(got, "dpkg") {
		t.Errorf("dpkg in the container: %q (%v)", got, err)
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

// debianTar returns the tar of a minimal Debian, made once and kept in the cache.
func debianTar(t *testing.T) string {
	t.Helper()
	cache, err := harness.Cache()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "debian", "bookworm-minbase.tar")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := debootstrap(t.Context(), t.TempDir(), path); err != nil {
		t.Fatal(err)
	}
	return path
}

func debootstrap(ctx context.Context, dir, path string) error {
	root := filepath.Join(dir, "root")
	for _, args := range [][]string{
		{"debootstrap", "--variant=minbase", "bookworm", root},
		{"rm", "-rf", root + "/var/cache/apt/archives", root + "/var/lib/apt/lists"},
		{"tar", "-C", root, "--sort=name", "--xattrs", "--numeric-owner", "--one-file-system", "-cf", path + ".part", "."},
	} {
		cmd := exec.CommandContext(ctx, args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, lastBytes(out, 2000))
		}
	}
	return os.Rename(path+".part", path)
}

func lastBytes(p []byte, n int) []byte { return bytes.TrimSpace(p[max(0, len(p)-n):]) }
