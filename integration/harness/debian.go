package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/pkg/archive"
)

// DebianSuites are the releases that tests make images of.
var DebianSuites = []string{"bookworm", "trixie"}

// debianSteps are what a build would run on the minimal system, each for a layer of its own. The last one takes away and
// replaces much of what the others brought.
var debianSteps = []string{
	`echo 'Acquire::GzipIndexes "true"; Dir::Cache { pkgcache ""; srcpkgcache ""; };' > /etc/apt/apt.conf.d/90small; ` +
		"apt-get update -q && apt-get install -qy --no-install-recommends less ca-certificates && apt-get clean",
	"apt-get install -qy --no-install-recommends python3-minimal && apt-get clean",
	"apt-get purge -qy less && rm -rf /var/lib/apt/lists /usr/share/doc && ln -sfn info /usr/share/doc && rm -rf /var/log && mkdir -m 2775 /var/log && touch /var/log/new",
}

// DebianTars returns the layers of a Debian, lowest first: a minimal system as debootstrap makes it, and what each of
// several changes to it changed. They are made once, which takes minutes and the network, and kept in the cache.
// Processes that want the same ones at once wait for each other.
func DebianTars(ctx context.Context, suite string) (_ []string, err error) {
	cache, err := Cache()
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, "debian")
	tars := []string{filepath.Join(dir, suite+"-minbase.tar")}
	for i := range debianSteps {
		tars = append(tars, filepath.Join(dir, fmt.Sprintf("%s-apt-%d.tar", suite, i+1)))
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(dir, suite))
	if err != nil {
		return nil, err
	}
	defer unlock()
	if _, err := os.Stat(tars[len(tars)-1]); err == nil {
		return tars, nil // the last one is made last
	}
	folder, err := NewPrivateFolder()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, folder.Close()) }()
	fmt.Printf("making the layers of Debian %s, once\n", suite)
	return tars, debianLayers(ctx, folder.Path, suite, tars)
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

// command runs a program that ends, with all that it has started, when ctx does.
func command(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, lastBytes(out, 2000))
	}
	return nil
}

func lastBytes(p []byte, n int) []byte { return bytes.TrimSpace(p[max(0, len(p)-n):]) }
