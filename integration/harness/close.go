package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Close ends containers, containerd and gantryd, undoes every mount and loop
// device under the node's folder and removes it. The error names whatever
// would have been left behind: a daemon that had died, a shim nobody stopped,
// a mount that was busy. It is gone all the same, as far as that is possible.
func (n *Node) Close() error {
	return errors.Join(n.Stop(), n.folder.Close())
}

// Stop ends containers, containerd and gantryd and leaves the folder, and what
// is mounted there, to Close. A second call does nothing.
func (n *Node) Stop() error {
	var errs []error
	if n.client != nil {
		errs = append(errs, n.stopTasks(), n.client.Close())
		n.client = nil
	}
	if n.containerd != nil {
		errs = append(errs, n.containerd.Stop())
		n.containerd = nil
	}
	if n.gantryd != nil {
		errs = append(errs, n.gantryd.Stop())
		n.gantryd = nil
	}
	if n.proxied != nil {
		errs = append(errs, n.proxied.Stop())
		n.proxied = nil
	}
	return errors.Join(errs...)
}

// stopTasks deletes every container of every namespace, so that their shims end.
//
//nolint:contextcheck // it runs when the caller's context has ended
func (n *Node) stopTasks() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	all, err := n.client.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list namespaces before the stop: %w", err)
	}
	var errs []error
	for _, ns := range all {
		ctx := namespaces.WithNamespace(ctx, ns)
		containers, err := n.client.Containers(ctx)
		errs = append(errs, err)
		for _, c := range containers {
			if task, err := c.Task(ctx, nil); err == nil {
				_, err = task.Delete(ctx, containerd.WithProcessKill)
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// Sweep ends processes that were started from or for the folder, unmounts what
// is mounted below it, detaches loop devices of files in it, and removes it.
// Processes, loop devices and busy mounts are leaks and make it fail.
func Sweep(dir string) error {
	errs := []error{endProcesses(dir), unmountBelow(dir), detachLoops(dir)}
	return errors.Join(append(errs, os.RemoveAll(dir))...)
}

// endProcesses kills shims and whatever else names the folder on its command
// line. The caller is spared.
func endProcesses(dir string) error {
	left, err := processesOf(dir)
	// A shim takes a moment to go after its last task.
	for deadline := time.Now().Add(5 * time.Second); len(left) > 0 && time.Now().Before(deadline); {
		time.Sleep(20 * time.Millisecond)
		left, err = processesOf(dir)
	}
	errs := []error{err}
	for pid, cmdline := range left {
		errs = append(errs, fmt.Errorf("process %d was left: %s", pid, cmdline))
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func processesOf(dir string) (map[int]string, error) {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return nil, err
	}
	found := map[int]string{}
	for _, path := range files {
		pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		cmdline, err := os.ReadFile(path)
		if err != nil || pid == os.Getpid() || !namesFolder(cmdline, dir) {
			continue // ended meanwhile, or not ours
		}
		found[pid] = string(bytes.ReplaceAll(cmdline, []byte{0}, []byte{' '}))
	}
	return found, nil
}

// namesFolder says whether an argument is the folder or a path below it.
func namesFolder(cmdline []byte, dir string) bool {
	return slices.ContainsFunc(strings.Split(string(cmdline), "\x00"), func(arg string) bool {
		return arg == dir || strings.HasPrefix(arg, dir+"/")
	})
}

// unmountBelow unmounts the newest first. What is busy is detached, and named in the error.
func unmountBelow(dir string) error {
	mounts, err := MountsBelow(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, m := range slices.Backward(mounts) {
		if err := unix.Unmount(m, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m, err), unix.Unmount(m, unix.MNT_DETACH))
		}
	}
	return errors.Join(errs...)
}

// MountsBelow returns the mount points under the folder, oldest first.
func MountsBelow(dir string) ([]string, error) {
	infos, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, err
	}
	var points []string
	for _, i := range infos {
		points = append(points, i.Mountpoint)
	}
	return points, nil
}

// LoopsOf returns the loop devices whose backing file lies under the folder.
func LoopsOf(dir string) ([]string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return nil, err
	}
	var devices []string
	for _, f := range files {
		backing, err := os.ReadFile(f)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue // detached meanwhile
		}
		if err != nil {
			return nil, err
		}
		if strings.HasPrefix(string(backing), dir+"/") {
			devices = append(devices, "/dev/"+strings.Split(f, "/")[3])
		}
	}
	return devices, nil
}

func detachLoops(dir string) error {
	devices, err := LoopsOf(dir)
	errs := []error{err}
	for _, device := range devices {
		f, err := os.Open(device)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, fmt.Errorf("loop device %s was left", device), unix.IoctlSetInt(int(f.Fd()), unix.LOOP_CLR_FD, 0), f.Close())
	}
	return errors.Join(errs...)
}
