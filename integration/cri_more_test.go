package integration

import (
	"context"
	"fmt"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// TestCRIRestarts restarts containerd, then gantryd, under a pod: it goes on, its image is known, another one starts beside
// it, and all can be removed.
func TestCRIRestarts(t *testing.T) {
	n := newCRI(t, "", harness.Options{})
	im, ref := push(t, n.registry, n.proxy.Host(), "app", small(63, 2<<20))
	id := n.criPull(t, ref)
	pod, config := n.pod(t, "pod")
	c := n.container(t, pod, config, "one", id)
	n.exec(t, c, "/helper", "write", "/kept", "kept")
	restarts := map[string]func() error{"containerd": func() error {
		if err := n.Containerd().Stop(); err != nil {
			return err
		}
		return n.StartContainerd(t.Context())
	}}
	if n.Gantryd() != nil {
		restarts["gantryd"] = func() error {
			n.KillGantryd()
			if err := n.StartGantryd(t.Context()); err != nil {
				return err
			}
			// containerd has a connection for content and one for snapshots, waits a little longer after each failed
			// attempt, and answers lists from its own database.
			for _, command := range [][]string{{"content", "get", im.Config.Digest.String()}, {"snapshots", "--snapshotter", n.Snapshotter, "usage"}} {
				eventually(t, "containerd to notice", func() error {
					_, err := n.Ctr(t.Context(), "k8s.io", command...)
					return err
				})
			}
			return nil
		}
	}
	for what, restart := range restarts {
		if err := restart(); err != nil {
			t.Fatal(err)
		}
		eventually(t, "exec after a restart of "+what, func() error {
			resp, err := n.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: c, Cmd: []string{"/helper", "cat", "/kept", "/etc/link"}, Timeout: 30})
			if err == nil && string(resp.Stdout) != "kept63" {
				t.Errorf("exec printed %q", resp.Stdout)
			}
			return err
		})
		eventually(t, "the image to be known", func() error {
			resp, err := n.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
			if err == nil && resp.Image.GetId() != id {
				t.Fatalf("after a restart of %s the image is %v", what, resp.Image)
			}
			return err
		})
		beside, config := n.pod(t, "beside-"+what)
		if got := n.exec(t, n.container(t, beside, config, "one", ref), "/helper", "cat", "/etc/link"); got != "63" {
			t.Errorf("exec printed %q, want 63", got)
		}
		n.removePod(t, beside)
	}
	n.removePod(t, pod)
	if _, err := n.CRI.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Error(err)
	}
	checkCRIFreed(t, n, im)
}

// TestCRIProgress has containerd watch a pull that it does not make itself. One whose bytes come slowly, for longer than
// image_pull_progress_timeout, goes on; one that stands still is cancelled: where containerd pulls by itself it only sees
// what it fetches itself, so not before gantry gave up.
func TestCRIProgress(t *testing.T) {
	for name, key := range map[string]string{"transfer service": "", "local pull": "use_local_image_pull = true"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newCRI(t, "image_pull_progress_timeout = '2s'\n"+key, harness.Options{GantryExtra: "[transfer]\ngive_up = '5s'\n"})
			var big atomic.Value // the digest of the image's one large layer
			pull := func(seed uint64, o harness.FaultOptions, rule harness.Rule) error {
				im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(seed, 4<<20))
				if err != nil {
					t.Fatal(err)
				}
				big.Store(im.Layers[2].Digest.String())
				f := newFaultRegistry(t, o)
				f.SetRule(rule)
				if err := n.AddRegistry("http", f.Host()); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				_, err = n.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: f.AddImage(im, "progress", "test")}})
				return err
			}
			if err := pull(66, harness.FaultOptions{Total: 1 << 20}, nil); err != nil {
				t.Errorf("a slow pull: %v", err)
			}
			var begun atomic.Bool
			err := pull(67, harness.FaultOptions{}, func(r *http.Request) *harness.Fault {
				switch {
				case !strings.HasSuffix(r.URL.Path, big.Load().(string)):
					return nil
				case begun.CompareAndSwap(false, true):
					return &harness.Fault{StallAfter: 2 << 20} // in less, containerd sees no beginning
				}
				return &harness.Fault{Latency: time.Hour}
			})
			if status.Code(err) != codes.Canceled {
				t.Errorf("a pull that stands still: %v, want that it is cancelled", err)
			}
		})
	}
}

// TestCRIReadOnly has a container whose root may not be written, and one that fills a volume of its image.
func TestCRIReadOnly(t *testing.T) {
	n := newCRI(t, "", harness.Options{})
	spec := small(64, 1<<20)
	spec.Config.Volumes = map[string]struct{}{"/tmp": {}}
	_, ref := push(t, n.registry, n.proxy.Host(), "app", spec)
	n.criPull(t, ref)
	pod, config := n.pod(t, "pod")
	created, err := n.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "fixed"},
		Image:    &cri.ImageSpec{Image: ref},
		Command:  []string{"/helper", "sleep", "3600"},
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: config.Linux.SecurityContext.NamespaceOptions, ReadonlyRootfs: true,
		}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := n.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		t.Fatal(err)
	}
	if got := n.exec(t, created.ContainerId, "/helper", "cat", "/etc/link"); got != "64" {
		t.Errorf("exec printed %q, want 64", got)
	}
	n.exec(t, created.ContainerId, "/helper", "write", "/tmp/volume", "text")
	resp, err := n.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: created.ContainerId, Cmd: []string{"/helper", "write", "/etc/x", "y"}})
	if err != nil || resp.ExitCode == 0 {
		t.Errorf("writing to a read-only root: %v, %v", resp, err)
	}
	n.removePod(t, pod)
}

// TestCRIRuntimeSnapshotter runs one pod on gantry and one on overlayfs, of the same image, by their runtime classes.
func TestCRIRuntimeSnapshotter(t *testing.T) {
	needGantry(t)
	const more = `
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.plain]
runtime_type = 'io.containerd.runc.v2'
snapshotter = 'overlayfs'
[plugins.'io.containerd.cri.v1.images'.runtime_platforms.plain]
snapshotter = 'overlayfs'
`
	n := newCRI(t, "", harness.Options{ContainerdExtra: more})
	_, ref := push(t, n.registry, n.proxy.Host(), "app", small(65, 1<<20))
	for handler, wanted := range map[string]string{"": harness.Gantry, "plain": harness.Overlayfs} {
		if _, err := n.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref, RuntimeHandler: handler}}); err != nil {
			t.Fatalf("%q: %v", handler, err)
		}
		config := &cri.PodSandboxConfig{
			Metadata:     &cri.PodSandboxMetadata{Name: "pod" + handler, Uid: "uid" + handler, Namespace: "tests"},
			LogDirectory: filepath.Join(n.Dir, "logs"),
			Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{
				NamespaceOptions: &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}}},
		}
		pod, err := n.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: handler})
		if err != nil {
			t.Fatalf("%q: %v", handler, err)
		}
		c := n.container(t, pod.PodSandboxId, config, "one", ref)
		if got := n.exec(t, c, "/helper", "cat", "/etc/link"); got != "65" {
			t.Errorf("%q: exec printed %q, want 65", handler, got)
		}
		out, err := n.Ctr(t.Context(), "k8s.io", "snapshot", "--snapshotter", wanted, "info", c)
		if err != nil {
			t.Errorf("%q: its snapshot: %v %s", handler, err, out)
		}
		n.removePod(t, pod.PodSandboxId)
	}
}

// TestCRIParallel has a kubelet without serializeImagePulls: sixteen pulls of four images at once; each image is fetched once.
func TestCRIParallel(t *testing.T) {
	n := newCRI(t, "", harness.Options{})
	var refs []string
	var all []*harness.Image
	for i := range 4 {
		im, ref := push(t, n.registry, n.proxy.Host(), fmt.Sprint("parallel", i), small(uint64(130+i), 4<<20))
		refs, all = append(refs, ref), append(all, im)
	}
	var g errgroup.Group
	for i := range 16 {
		g.Go(func() error {
			_, err := n.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: refs[i%4]}})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if n.Snapshotter == harness.Gantry {
		for _, im := range all {
			im.Layers = im.Layers[1:] // all images share the first
			checkBlobBytes(t, n.proxy, im, 1)
		}
	}
	var pods []string
	for i, ref := range refs {
		pod, config := n.pod(t, fmt.Sprint("pod", i))
		c := n.container(t, pod, config, "one", ref)
		if got, want := n.exec(t, c, "/helper", "cat", "/etc/link"), fmt.Sprint(130+i); got != want {
			t.Errorf("exec printed %q, want %s", got, want)
		}
		pods = append(pods, pod)
	}
	for i, pod := range pods {
		n.removePod(t, pod)
		if _, err := n.CRI.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: refs[i]}}); err != nil {
			t.Error(err)
		}
	}
	checkCRIFreed(t, n, all[0])
}
