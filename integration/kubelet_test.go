//go:build kubelet

package integration

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// kubeletNode is a node with a kubelet that ends with the test.
type kubeletNode struct {
	*criNode
	kubelet *harness.Kubelet
}

func (n *kubeletNode) start(t *testing.T, settings string) {
	t.Helper()
	var err error
	if n.kubelet, err = n.StartKubelet(t.Context(), settings); err != nil {
		t.Fatal(err)
	}
}

func (n *kubeletNode) stop(t *testing.T) {
	t.Helper()
	if n.kubelet == nil {
		return
	}
	if t.Failed() {
		t.Log(n.kubelet.Tail())
	}
	if err := n.kubelet.Stop(); err != nil {
		t.Errorf("stop the kubelet: %v", err)
	}
	n.kubelet = nil
}

// wait polls the kubelet until its pods are as check wants them. Pods come up
// within seconds, a busy machine included in minutes.
func (n *kubeletNode) wait(t *testing.T, what string, check func(map[string]harness.PodState) bool) map[string]harness.PodState {
	t.Helper()
	var pods map[string]harness.PodState
	for deadline := time.Now().Add(3 * time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		var err error
		if pods, err = n.kubelet.Pods(t.Context()); err != nil {
			t.Fatal(err)
		}
		if check(pods) {
			return pods
		}
	}
	t.Fatalf("%s: the kubelet says %+v", what, pods)
	return nil
}

func (n *kubeletNode) run(t *testing.T, policy, ref string, names ...string) map[string]harness.PodState {
	t.Helper()
	for _, name := range names {
		if err := n.kubelet.RunPod(name, ref, policy, "/helper", "sleep", "3600"); err != nil {
			t.Fatal(err)
		}
	}
	return n.wait(t, fmt.Sprint(names, " run"), func(pods map[string]harness.PodState) bool {
		for _, name := range names {
			if !pods[name].Running {
				return false
			}
		}
		return true
	})
}

func (n *kubeletNode) remove(t *testing.T, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := n.kubelet.RemovePod(name); err != nil {
			t.Fatal(err)
		}
	}
	n.wait(t, fmt.Sprint(names, " are gone"), func(pods map[string]harness.PodState) bool {
		for _, name := range names {
			if _, ok := pods[name]; ok {
				return false
			}
		}
		return true
	})
}

// layerBytes is what the registry has sent of the image's layers.
func (n *kubeletNode) layerBytes(im *harness.Image) (sum int64) {
	for _, l := range im.Layers {
		for _, bytes := range n.proxy.BlobBytes()[l.Digest] {
			sum += bytes
		}
	}
	return sum
}

// TestKubelet has a real kubelet, without an API server, run pods on gantry:
// imagePullSecrets are the one thing that needs a server.
func TestKubelet(t *testing.T) {
	needGantry(t)
	runc, err := exec.LookPath("/usr/sbin/runc")
	if err != nil {
		t.Fatalf("the kubelet's sandboxes need a runc with seccomp (make test-kubelet installs Debian's): %v", err)
	}
	n := &kubeletNode{criNode: newCRI(t, "", harness.Options{Runc: runc})}
	t.Cleanup(func() { n.end(t) })
	n.start(t, "evictionHard: {}")
	im, ref := push(t, n.registry, n.proxy.Host(), "kubelet", small(7, 32<<20))

	// Two pods at once: each layer is sent once.
	pods := n.run(t, "IfNotPresent", ref, "one", "two")
	if got := n.layerBytes(im); got != im.Size() {
		t.Errorf("two pods: the registry sent %d bytes of layers of %d", got, im.Size())
	}
	for _, name := range []string{"one", "two"} {
		if got := n.exec(t, pods[name].ContainerID, "/helper", "cat", "/etc/link"); got != "7" {
			t.Errorf("%s reads %q, want 7", name, got)
		}
	}
	n.checkLog(t, ref, " 7")

	// Pulled always, and the layers stay where they are.
	pods = n.run(t, "Always", ref, "always")
	if got := n.layerBytes(im); got != im.Size() {
		t.Errorf("imagePullPolicy Always: the registry has sent %d bytes of layers of %d", got, im.Size())
	}

	n.checkWrongImages(t)
	n.checkCrash(t, pods, "one", "two", "always")

	// The kubelet frees what no pod needs when the disk is short.
	n.remove(t, "one", "two", "always")
	n.stop(t)
	n.start(t, "evictionHard: {imagefs.available: \"99%\"}")
	n.checkImageGone(t, ref)
}

// checkLog wants what a container prints in the file that the kubelet gave to CRI for it.
func (n *kubeletNode) checkLog(t *testing.T, ref, want string) {
	t.Helper()
	if err := n.kubelet.RunPod("talks", ref, "IfNotPresent", "/helper", "cat", "/etc/seed"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "log of a container", func() error {
		files, err := filepath.Glob(filepath.Join(n.Dir, "kubelet", "pods", "*_talks-*", "main", "0.log"))
		if err != nil || len(files) != 1 {
			return fmt.Errorf("log files %q: %w", files, err)
		}
		log, err := os.ReadFile(files[0])
		if err == nil && (!strings.Contains(string(log), " stdout ") || !strings.HasSuffix(strings.TrimSpace(string(log)), want)) {
			err = fmt.Errorf("%s holds %q", files[0], log)
		}
		return err
	})
	n.remove(t, "talks")
}

// checkWrongImages wants images that are not there, and one whose blob the
// registry refuses, to say so in the pod's state and in its events.
func (n *kubeletNode) checkWrongImages(t *testing.T) {
	t.Helper()
	refused, ref := push(t, n.registry, n.proxy.Host(), "refused", small(8, 1<<20))
	n.proxy.SetRule(func(r *http.Request) *harness.Fault {
		if strings.HasSuffix(r.URL.Path, refused.Layers[2].Digest.String()) {
			return &harness.Fault{Status: http.StatusForbidden}
		}
		return nil
	})
	defer n.proxy.SetRule(nil)
	missing := n.proxy.Host() + "/kubelet:nothing"
	for name, tc := range map[string]struct{ ref, message string }{
		"missing": {missing, "not found"}, "refused": {ref, "403"},
	} {
		if err := n.kubelet.RunPod(name, tc.ref, "IfNotPresent", "/helper", "sleep", "3600"); err != nil {
			t.Fatal(err)
		}
		state := n.wait(t, name+" is in ImagePullBackOff", func(pods map[string]harness.PodState) bool {
			return pods[name].Reason == "ImagePullBackOff"
		})[name]
		if !strings.Contains(state.Message, tc.ref) || !strings.Contains(state.Message, tc.message) {
			t.Errorf("%s: message %q, want %q and %q in it", name, state.Message, tc.ref, tc.message)
		}
		log, err := os.ReadFile(n.kubelet.Log())
		if err != nil {
			t.Fatal(err)
		}
		if event := fmt.Sprintf("Failed to pull image %q", tc.ref); !strings.Contains(strings.ReplaceAll(string(log), `\"`, `"`), event) {
			t.Errorf("%s: no event with %q", name, event)
		}
	}
	n.remove(t, "missing", "refused")
}

// checkCrash kills gantryd while pods run, and starts it again: the pods go on,
// and files are readable meanwhile.
func (n *kubeletNode) checkCrash(t *testing.T, before map[string]harness.PodState, names ...string) {
	t.Helper()
	read := func(when string) {
		t.Helper()
		for _, name := range names {
			if got := n.exec(t, before[name].ContainerID, "/helper", "sum", "/noise"); len(got) < 64 {
				t.Errorf("%s: %s reads %q", when, name, got)
			}
		}
	}
	n.KillGantryd()
	read("without gantryd")
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	read("after the restart")
	_, ref := push(t, n.registry, n.proxy.Host(), "later", small(9, 1<<20))
	after := n.run(t, "IfNotPresent", ref, "later")
	for _, name := range names {
		if after[name].ContainerID != before[name].ContainerID || after[name].Restarts != before[name].Restarts || !after[name].Running {
			t.Errorf("%s was %+v before the crash and is %+v", name, before[name], after[name])
		}
	}
	n.remove(t, "later")
}

// checkImageGone waits until the kubelet has removed the image, and gantry what it was made of.
func (n *kubeletNode) checkImageGone(t *testing.T, ref string) {
	t.Helper()
	deadline := time.Now().Add(3 * time.Minute)
	for {
		resp, err := n.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		if resp.Image == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the kubelet did not remove the image")
		}
		time.Sleep(200 * time.Millisecond)
	}
	eventually(t, "layers of the removed image", func() error {
		entries, err := os.ReadDir(filepath.Join(n.Dir, "gantry", "snapshots"))
		if err == nil && len(entries) > 1 { // the sandbox image is pinned
			err = fmt.Errorf("%d snapshots", len(entries))
		}
		return err
	})
}

// end stops the kubelet and its pods, and wants nothing of them to be left.
func (n *kubeletNode) end(t *testing.T) {
	t.Helper()
	n.stop(t)
	ctx := context.WithoutCancel(t.Context())
	list, err := n.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		t.Error(err)
	}
	for _, p := range list.GetItems() {
		_, stop := n.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Id})
		_, remove := n.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Id})
		if err := errors.Join(stop, remove); err != nil {
			t.Errorf("pod %s: %v", p.Metadata.Name, err)
		}
	}
	mounts, err := harness.MountsBelow(filepath.Join(n.Dir, "kubelet"))
	if err != nil || len(mounts) > 0 {
		t.Errorf("mounts of the kubelet: %v, %v", mounts, err)
	}
}
