package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"
)

// The snapshotters a node can be started for.
const (
	Gantry    = "gantry"
	Overlayfs = "overlayfs" // containerd as shipped, without gantryd
	Proxied   = "proxied"   // Overlayfs, and containerd's content store, as proxy plugins of a program of their own
	Erofs     = "erofs"     // containerd's own, with its differ; mkfs.erofs must be among the peers or in PATH
)

// The file systems that gantryd's root can be made, besides ext4.
const (
	Tmpfs   = "tmpfs"
	Overlay = "overlay"
)

// Options say what a node is to be.
type Options struct {
	Snapshotter     string // Gantry (default), Overlayfs, Proxied or Erofs
	CRI             bool   // with containerd's CRI plugin
	Runc            string // another runc than the peers', for pods; its path
	Line            string // of containerd: "2.2" or "2.3" for the newest of an older one
	ContainerdExtra string // TOML after containerd's configuration
	ContainerdKeys  string // TOML inside gantryd's table [containerd]
	GantryExtra     string // TOML after gantryd's configuration
	GCDelay         time.Duration
	DiskMiB         int      // gantryd's root is an ext4 file system of this size; 0: a folder like any other
	Root            string   // of gantryd's root, else containerd's: Tmpfs, Overlay (gantryd only), or "" for the disk's
	NoSync          bool     // containerd's database leaves it to the kernel when to write; older lines know no such thing
	Isolated        bool     // namespaces do not share content
	Env             []string // for containerd
}

// Node is one machine's containerd and, unless Overlayfs was asked for, the
// gantryd it uses, in a folder of their own.
type Node struct {
	Dir         string
	Snapshotter string

	options    Options
	folder     *PrivateFolder
	gantryd    *Process
	proxied    *Process
	containerd *Process

	mu     sync.Mutex
	client *containerd.Client
}

// StartNode starts gantryd and containerd in a new folder and waits until both answer.
// The caller closes the node, which removes the folder.
func StartNode(ctx context.Context, o Options) (*Node, error) {
	if o.Snapshotter == "" {
		o.Snapshotter = Gantry
	}
	folder, err := NewPrivateFolder()
	if err != nil {
		return nil, err
	}
	n := &Node{Dir: folder.Path, Snapshotter: o.Snapshotter, options: o, folder: folder}
	if err := n.start(ctx); err != nil {
		return nil, errors.Join(err, n.Close())
	}
	return n, nil
}

func (n *Node) start(ctx context.Context) error {
	for _, sub := range []string{"certs.d", "logs"} {
		if err := os.Mkdir(filepath.Join(n.Dir, sub), 0o700); err != nil {
			return err
		}
	}
	if n.options.Root != "" {
		if err := n.mountRoot(); err != nil {
			return err
		}
	}
	if n.options.DiskMiB > 0 {
		if err := n.mountDisk(ctx); err != nil {
			return err
		}
	}
	if n.Snapshotter == Gantry {
		if err := n.configureGantryd(ctx); err != nil {
			return err
		}
		if err := n.StartGantryd(ctx); err != nil {
			return err
		}
	}
	if n.Snapshotter == Proxied {
		if err := n.startProxied(ctx); err != nil {
			return err
		}
	}
	config, err := render(containerdConfig, containerdValues{
		Dir: n.Dir, DropIn: n.dropIn(), GCDelay: n.options.GCDelay.String(), CRI: n.options.CRI,
		Line: n.options.Line, Runc: n.options.Runc, Erofs: n.Snapshotter == Erofs, Extra: n.options.ContainerdExtra,
		NoSync: n.options.NoSync && n.options.Line == "", Isolated: n.options.Isolated,
	})
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.path("containerd.toml"), config, 0o600); err != nil {
		return err
	}
	return n.StartContainerd(ctx)
}

// mountDisk gives gantryd a root of limited size. The loop device goes with the mount.
func (n *Node) mountDisk(ctx context.Context) error {
	file, root := n.path("disk"), n.path("gantry")
	if err := os.Mkdir(root, 0o700); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"truncate", "-s", fmt.Sprintf("%dM", n.options.DiskMiB), file},
		{"mkfs.ext4", "-q", "-m", "0", file},
		{"mount", "-o", "loop", file, root},
		{"rmdir", filepath.Join(root, "lost+found")},
	} {
		if _, err := output(exec.CommandContext(ctx, args[0], args[1:]...)); err != nil {
			return err
		}
	}
	return nil
}

// mountRoot mounts a file system at gantryd's root, or at containerd's.
func (n *Node) mountRoot() error {
	if n.Snapshotter != Gantry {
		return MountTmpfs(n.path("containerd"))
	}
	if n.options.Root == Tmpfs {
		return MountTmpfs(n.path("gantry"))
	}
	root, disk := n.path("gantry"), n.path("below")
	for _, dir := range []string{root, disk, disk + "/lower", disk + "/upper", disk + "/work"} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	data := fmt.Sprintf("lowerdir=%[1]s/lower,upperdir=%[1]s/upper,workdir=%[1]s/work", disk)
	return unix.Mount(Overlay, root, Overlay, 0, data)
}

func (n *Node) path(name string) string { return filepath.Join(n.Dir, name) }

func (n *Node) dropIn() string {
	switch n.Snapshotter {
	case Gantry, Proxied:
		return n.path(n.Snapshotter + "-dropin.toml")
	}
	return ""
}

// configureGantryd writes gantryd's file, and the drop-in that `gantry config containerd` makes of it.
func (n *Node) configureGantryd(ctx context.Context) error {
	config, err := render(gantrydConfig, gantrydValues{n.Dir, n.options.ContainerdKeys, n.options.GantryExtra, n.options.Isolated})
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.path("gantry.toml"), config, 0o600); err != nil {
		return err
	}
	dropIn, err := n.GantryCLI(ctx, "config", "containerd")
	if err != nil {
		return err
	}
	return os.WriteFile(n.dropIn(), []byte(dropIn), 0o600)
}

// StartGantryd starts gantryd, for the first time or again after [Node.KillGantryd].
func (n *Node) StartGantryd(ctx context.Context) error {
	program, err := Program("gantryd")
	if err != nil {
		return err
	}
	n.gantryd, err = start(ctx, n.path("logs"), "gantryd", nil, program, "--config", n.path("gantry.toml"))
	if err != nil {
		return err
	}
	return n.gantryd.answers(ctx, n.path("g.sock"))
}

// StartContainerd starts containerd, for the first time or again after it was stopped.
func (n *Node) StartContainerd(ctx context.Context) error {
	program, err := n.peer("containerd")
	if err != nil {
		return err
	}
	runc, err := Program("runc")
	if err != nil {
		return err
	}
	// containerd looks for the shim, and the shim for runc, in PATH.
	env := slices.Concat(n.options.Env, []string{"PATH=" + filepath.Dir(program) + ":" + filepath.Dir(runc) + ":" + os.Getenv("PATH")})
	n.containerd, err = start(ctx, n.path("logs"), "containerd", env, program, "--config", n.path("containerd.toml"))
	if err != nil {
		return err
	}
	return n.containerd.ready(ctx, func(ctx context.Context) error {
		client, err := n.Client()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		if serving, err := client.IsServing(ctx); err != nil || !serving {
			return fmt.Errorf("not serving: %w", err)
		}
		return nil
	})
}

// peer returns the path of a program of the node's line of containerd.
func (n *Node) peer(name string) (string, error) {
	if n.options.Line != "" {
		name = filepath.Join("v"+n.options.Line, name)
	}
	return Program(name)
}

// Gantryd returns the running gantryd, nil on an Overlayfs node.
func (n *Node) Gantryd() *Process { return n.gantryd }

// Containerd returns the running containerd.
func (n *Node) Containerd() *Process { return n.containerd }

// KillGantryd kills gantryd as a crash would. [Node.StartGantryd] brings it back.
func (n *Node) KillGantryd() { n.gantryd.Kill() }

// Address returns the path of containerd's socket.
func (n *Node) Address() string { return n.path("c.sock") }

// Client returns the node's containerd client, shared and closed with the node.
// It has no default namespace: give one with namespaces.WithNamespace.
func (n *Node) Client() (*containerd.Client, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.client != nil {
		return n.client, nil
	}
	client, err := containerd.New(n.Address(), containerd.WithTimeout(10*time.Second))
	n.client = client
	return client, err
}

// AddRegistry tells gantryd how to reach host: over scheme, by way of mirrors first.
func (n *Node) AddRegistry(scheme, host string, mirrors ...string) error {
	dir := filepath.Join(n.Dir, "certs.d", host)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), hostsTOML(scheme, host, mirrors), 0o600)
}

// Ctr runs `ctr` against the node in the namespace and returns its standard
// output; what it wrote to standard error is part of the error.
func (n *Node) Ctr(ctx context.Context, namespace string, args ...string) (string, error) {
	cmd, err := n.CtrCommand(ctx, namespace, args...)
	if err != nil {
		return "", err
	}
	return output(cmd)
}

// CtrCommand prepares a call of ctr that the caller runs.
func (n *Node) CtrCommand(ctx context.Context, namespace string, args ...string) (*exec.Cmd, error) {
	program, err := n.peer("ctr")
	if err != nil {
		return nil, err
	}
	return exec.CommandContext(ctx, program, append([]string{"--address", n.Address(), "--namespace", namespace}, args...)...), nil
}

// GantryCLI runs `gantry` with the node's configuration and returns its standard output.
func (n *Node) GantryCLI(ctx context.Context, args ...string) (string, error) {
	program, err := Program("gantry")
	if err != nil {
		return "", err
	}
	return output(exec.CommandContext(ctx, program, append([]string{"--config", n.path("gantry.toml")}, args...)...))
}

func output(cmd *exec.Cmd) (string, error) {
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, exit.Stderr)
	}
	return string(out), err
}

// Pull runs `ctr image pull` through the transfer service, or with --local in
// ctr's own process. Loopback registries are asked over plain HTTP. A pull that
// hangs is ended after three minutes.
func (n *Node) Pull(ctx context.Context, namespace, ref string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 3*time.Minute, fmt.Errorf("the pull of %s hangs", ref))
	defer cancel()
	all := append([]string{"image", "pull", "--snapshotter", n.Snapshotter}, args...)
	out, err := n.Ctr(ctx, namespace, append(all, ref)...)
	if ctx.Err() != nil {
		err = errors.Join(context.Cause(ctx), err)
	}
	return out, err
}

// Run runs a command in a new container of the image and returns its output, errors included. It comes by way of a
// file: of a container that ends before ctr has opened its pipes, ctr prints nothing.
func (n *Node) Run(ctx context.Context, namespace, ref, id string, args ...string) (string, error) {
	log := n.path("logs/run-" + id)
	_, err := n.Ctr(ctx, namespace, n.runArgs([]string{"--rm", "--log-uri", "file://" + log}, ref, id, args)...)
	out, rerr := os.ReadFile(log)
	_ = os.Remove(log)
	if err != nil {
		return string(out), fmt.Errorf("%w: %s", err, out)
	}
	return string(out), rerr
}

// RunDetached starts a container that goes on; [Node.Exec] looks into it.
func (n *Node) RunDetached(ctx context.Context, namespace, ref, id string, args ...string) error {
	_, err := n.Ctr(ctx, namespace, n.runArgs([]string{"--detach", "--null-io"}, ref, id, args)...)
	return err
}

// Exec runs a command in a running container and returns its output.
func (n *Node) Exec(ctx context.Context, namespace, id string, args ...string) (string, error) {
	exec := []string{"task", "exec", "--exec-id", fmt.Sprintf("e%d", time.Now().UnixNano()), id}
	return n.Ctr(ctx, namespace, append(exec, args...)...)
}

func (n *Node) runArgs(flags []string, ref, id string, args []string) []string {
	all := append([]string{"run", "--snapshotter", n.Snapshotter, "--net-host", "--runc-root", n.path("runc")}, flags...)
	return append(append(all, ref, id), args...)
}
