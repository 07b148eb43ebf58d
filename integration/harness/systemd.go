package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// bootSystemd hides every unit, every tmpfiles.d rule and the folders that a systemd writes to: it must not set up the
// machine once more. $1 is the folder of its units, $2 a mount of its cgroup's hierarchy, $3 its cgroup there.
const bootSystemd = `set -eu
echo $$ > "$2$3/cgroup.procs"
exec unshare --mount --pid --ipc --cgroup --fork --kill-child --mount-proc sh -eu -c '
for d in /run /etc/systemd /usr/lib/tmpfiles.d /sys/fs/cgroup; do mount -t tmpfs tmpfs "$d"; done
mkdir -p /etc/systemd/system
mount --bind "$1" /usr/lib/systemd/system
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -o bind,ro /proc/sys /proc/sys
export container=test
exec /lib/systemd/systemd --system --unit=test.target --log-target=console --show-status=no
' sh "$1"`

// Systemd is a systemd in namespaces of its own, which has the units that it was given and no others.
type Systemd struct {
	*Process

	units    string // their folder
	cgroup   string
	unified  string // where its hierarchy is mounted
	instance int    // the process id of systemd itself
}

// StartSystemd boots one in a folder of a private one. The caller closes it.
func StartSystemd(ctx context.Context, dir string, units map[string]string) (_ *Systemd, err error) {
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		return nil, fmt.Errorf("systemd is missing: apt-get install systemd: %w", err)
	}
	s := &Systemd{units: filepath.Join(dir, "units"), unified: filepath.Join(dir, "cgroup"), cgroup: "/" + filepath.Base(dir)}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	for _, d := range []string{s.units, s.unified} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return nil, err
		}
	}
	// What a unit depends on without being told.
	for _, name := range []string{"test", "sysinit", "basic", "shutdown", "multi-user"} {
		if err := os.WriteFile(filepath.Join(s.units, name+".target"), []byte("[Unit]\nDefaultDependencies=no\n"), 0o600); err != nil {
			return nil, err
		}
	}
	for name, text := range units {
		if err := os.WriteFile(filepath.Join(s.units, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	if err := unix.Mount("cgroup2", s.unified, "cgroup2", 0, ""); err != nil {
		return nil, fmt.Errorf("mount cgroup2: %w", err)
	}
	if err := os.Mkdir(s.unified+s.cgroup, 0o700); err != nil {
		return nil, err
	}
	if s.Process, err = start(ctx, dir, "systemd", nil, "/bin/sh", "-c", bootSystemd, "sh", s.units, s.unified, s.cgroup); err != nil {
		return nil, err
	}
	// The shell becomes unshare, whose one child becomes systemd.
	return s, s.ready(ctx, func(ctx context.Context) error {
		if s.instance = child(s.PID()); s.instance == 0 {
			return errors.New("systemd is not started")
		}
		_, err := s.Ctl(ctx, "list-units")
		return err
	})
}

// child returns the first child of a process, 0 if it has none.
func child(pid int) int {
	list, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if first := strings.Fields(string(list)); err == nil && len(first) > 0 {
		pid, err = strconv.Atoi(first[0])
		if err == nil {
			return pid
		}
	}
	return 0
}

// Ctl runs systemctl and returns what it printed.
func (s *Systemd) Ctl(ctx context.Context, args ...string) (string, error) {
	all := append([]string{"--target", strconv.Itoa(s.instance), "--mount", "--pid", "--cgroup", "--ipc", "systemctl", "--no-pager"}, args...)
	out, err := exec.CommandContext(ctx, "nsenter", all...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("systemctl %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

// Close ends systemd and all that it runs, and removes its cgroups.
func (s *Systemd) Close() error {
	if s.Process != nil {
		s.Kill()
	}
	// The processes of its namespace are killed, and gone a moment later.
	var err error
	for range 100 {
		if err = removeCgroup(s.unified + s.cgroup); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if uerr := unix.Unmount(s.unified, unix.MNT_DETACH); uerr != nil && !errors.Is(uerr, unix.EINVAL) && !errors.Is(uerr, unix.ENOENT) {
		err = errors.Join(err, uerr)
	}
	return err
}

// removeCgroup removes a cgroup without processes, and those in it.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return os.Remove(dir)
}
