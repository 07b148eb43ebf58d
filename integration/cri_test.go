package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/integration/harness"
)

// criNode is a node that the kubelet could be on: pods need a pause image, statistics are taken each second.
type criNode struct {
	*harness.Node
	*harness.CRI

	registry *harness.Registry
	proxy    *harness.Proxy
}

// newCRI starts a node with CRI. imageKeys go into the table of containerd's CRI image plugin.
func newCRI(t *testing.T, imageKeys string, o harness.Options) *criNode {
	t.Helper()
	r := newRegistry(t)
	p := newProxy(t, r)
	pause := harness.ImageSpec{Layers: []harness.LayerSpec{{Tar: harness.HelperTar(helper)}}}
	pause.Config.Entrypoint = []string{"/helper", "sleep", "3600"}
	_, ref := push(t, r, p.Host(), "pause", pause)
	o.CRI = true
	o.ContainerdExtra += fmt.Sprintf("\n[plugins.'io.containerd.cri.v1.images']\nstats_collect_period = 1\n%s\n"+
		"[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = %q\n", imageKeys, ref)
	n := newNode(t, o)
	if err := n.AddRegistry("http", p.Host()); err != nil {
		t.Fatal(err)
	}
	return &criNode{Node: n, CRI: dialCRI(t, n), registry: r, proxy: p}
}

func dialCRI(t *testing.T, n *harness.Node) *harness.CRI {
	t.Helper()
	c, err := n.CRI()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// criPull pulls by the name given and returns the image's id.
func (n *criNode) criPull(t *testing.T, ref string) string {
	t.Helper()
	resp, err := n.PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}})
	if err != nil {
		t.Fatalf("PullImage %s: %v", ref, err)
	}
	return resp.ImageRef
}

// pod starts a pod in the host's network, which ends with the test.
func (n *criNode) pod(t *testing.T, name string) (id string, config *cri.PodSandboxConfig) {
	t.Helper()
	host := &cri.NamespaceOption{Network: cri.NamespaceMode_NODE, Pid: cri.NamespaceMode_CONTAINER}
	config = &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Uid: "uid-" + name, Namespace: "tests"},
		LogDirectory: filepath.Join(n.Dir, "logs"),
		Linux:        &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: host}},
	}
	resp, err := n.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatalf("RunPodSandbox: %v", err)
	}
	return resp.PodSandboxId, config
}

// container starts the helper in the pod, asleep.
func (n *criNode) container(t *testing.T, pod string, config *cri.PodSandboxConfig, name, image string) string {
	t.Helper()
	created, err := n.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: pod, SandboxConfig: config, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name},
		Image:    &cri.ImageSpec{Image: image},
		Command:  []string{"/helper", "sleep", "3600"},
		LogPath:  name + ".log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: config.Linux.SecurityContext.NamespaceOptions,
		}},
	}})
	if err != nil {
		t.Fatalf("CreateContainer %s: %v", name, err)
	}
	if _, err := n.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created.ContainerId}); err != nil {
		t.Fatalf("StartContainer %s: %v", name, err)
	}
	return created.ContainerId
}

// exec runs a command in a container, wants it to succeed and returns what it printed.
func (n *criNode) exec(t *testing.T, container string, args ...string) string {
	t.Helper()
	resp, err := n.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: container, Cmd: args, Timeout: 30})
	if err != nil || resp.ExitCode != 0 {
		t.Fatalf("exec %q: %v, exit code %d: %s", args, err, resp.GetExitCode(), resp.GetStderr())
	}
	return string(resp.Stdout)
}

func (n *criNode) removePod(t *testing.T, pod string) {
	t.Helper()
	if _, err := n.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Errorf("StopPodSandbox: %v", err)
	}
	if _, err := n.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Errorf("RemovePodSandbox: %v", err)
	}
}

// TestCRI does what a kubelet does in the life of an image and a pod, with each setting that changes the way of the bytes.
func TestCRI(t *testing.T) {
	for name, tc := range map[string]struct {
		keys   string
		o      harness.Options
		unpack int // max_concurrent_unpacks; 0: what the drop-in says
	}{
		"defaults":              {},
		"discarding by CRI":     {keys: "discard_unpacked_layers = true"},
		"discarding by gantry":  {o: harness.Options{GantryExtra: discarding}},
		"discarding by both":    {keys: "discard_unpacked_layers = true", o: harness.Options{GantryExtra: discarding}},
		"one layer after other": {unpack: 1},
		"local pull":            {keys: "use_local_image_pull = true"},
		"isolated":              {o: harness.Options{Isolated: true}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if tc.unpack != 0 {
				needGantry(t)
			}
			n := newCRI(t, tc.keys, tc.o)
			if tc.unpack != 0 {
				setUnpacks(t, n.Node, tc.unpack)
			}
			checkCRI(t, n)
		})
	}
}

// setUnpacks says how many layers of an image containerd unpacks at once, and starts it anew.
func setUnpacks(t *testing.T, n *harness.Node, unpacks int) {
	t.Helper()
	path := filepath.Join(n.Dir, "gantry-dropin.toml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	found := false
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "max_concurrent_unpacks") {
			line, found = fmt.Sprintf("  max_concurrent_unpacks = %d\n", unpacks), true
		}
		lines = append(lines, line)
	}
	if !found {
		t.Fatal("the drop-in says nothing of max_concurrent_unpacks")
	}
	if err := os.WriteFile(path, []byte(strings.Join(lines, "")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.Containerd().Stop(); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func checkCRI(t *testing.T, n *criNode) {
	im, ref := push(t, n.registry, n.proxy.Host(), "app", small(61, 8<<20))
	byDigest := strings.TrimSuffix(ref, ":test") + "@" + im.Manifest.Digest.String()

	id := n.criPull(t, ref)
	if id != im.Config.Digest.String() {
		t.Errorf("PullImage said %s, want the config's digest %s", id, im.Config.Digest)
	}
	n.proxy.Forget()
	if again := n.criPull(t, byDigest); again != id {
		t.Errorf("PullImage by digest said %s, want %s", again, id)
	}
	if sent := n.proxy.BlobBytes(); len(sent) > 0 {
		t.Errorf("the pull by digest was sent %v, want nothing", sent)
	}
	checkCRIStatus(t, n, id, ref, byDigest, im)

	pod, config := n.pod(t, "pod")
	c := n.container(t, pod, config, "one", id)
	other := n.container(t, pod, config, "two", ref)
	if got := n.exec(t, c, "/helper", "cat", "/etc/link"); got != "61" {
		t.Errorf("exec printed %q, want 61", got)
	}
	checkCRIUsage(t, n, c, other)
	if _, err := n.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: other}); err != nil {
		t.Errorf("StopContainer: %v", err)
	}
	if _, err := n.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: other}); err != nil {
		t.Errorf("RemoveContainer: %v", err)
	}

	// The image goes under a running container: what runs goes on, all of its files included.
	if _, err := n.CRI.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: id}}); err != nil {
		t.Errorf("RemoveImage: %v", err)
	}
	n.exec(t, c, "/helper", "sum", "/noise")
	n.removePod(t, pod)
	checkCRIFreed(t, n, im)

	// And it can come again.
	n.criPull(t, byDigest)
	pod, config = n.pod(t, "again")
	c = n.container(t, pod, config, "one", byDigest)
	if got := n.exec(t, c, "/helper", "cat", "/etc/link"); got != "61" {
		t.Errorf("exec printed %q, want 61", got)
	}
	n.removePod(t, pod)
}

// checkCRIStatus wants the image known by all of its names, with its size and digest.
func checkCRIStatus(t *testing.T, n *criNode, id, ref, byDigest string, im *harness.Image) {
	t.Helper()
	for _, name := range []string{id, ref, byDigest} {
		resp, err := n.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}, Verbose: true})
		if err != nil || resp.Image == nil {
			t.Fatalf("ImageStatus %s: %v, %v", name, resp, err)
		}
		if got := resp.Image; got.Id != id || strings.Join(got.RepoTags, " ") != ref || strings.Join(got.RepoDigests, " ") != byDigest ||
			int64(got.Size) < im.Size() || len(resp.Info) == 0 {
			t.Errorf("ImageStatus %s: %+v", name, resp)
		}
	}
	absent, err := n.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref + "-absent"}})
	if err != nil || absent.Image != nil {
		t.Errorf("ImageStatus of an image nobody has: %v, %v", absent, err)
	}
	list, err := n.ListImages(t.Context(), &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: ref}}})
	if err != nil || len(list.Images) != 1 || list.Images[0].Id != id {
		t.Errorf("ListImages: %v, %v", list, err)
	}
}

// checkCRIUsage writes 6 MiB into one of two containers, and wants CRI to tell what each of them and all images take.
func checkCRIUsage(t *testing.T, n *criNode, written, idle string) {
	t.Helper()
	const size = 6 << 20
	n.exec(t, written, "/helper", "fill", "/big", fmt.Sprint(size))
	n.exec(t, written, "/helper", "rm", "/etc/seed")
	eventually(t, "the writable layer's size to be told", func() error {
		resp, err := n.ListContainerStats(t.Context(), &cri.ListContainerStatsRequest{})
		if err != nil {
			return err
		}
		used := map[string]*cri.FilesystemUsage{}
		for _, s := range resp.Stats {
			used[s.Attributes.Id] = s.WritableLayer
		}
		one, two := used[written].GetUsedBytes().GetValue(), used[idle].GetUsedBytes().GetValue()
		if one < size || one > size+size/10 || two > 64<<10 {
			return fmt.Errorf("%d and %d bytes, want a little more than %d and little", one, two, size)
		}
		if inodes := used[written].GetInodesUsed().GetValue(); inodes < 3 { // the root, the file, a whiteout, /etc
			return fmt.Errorf("%d inodes", inodes)
		}
		return nil
	})
	if n.Snapshotter != harness.Gantry {
		return
	}
	resp, err := n.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
	if err != nil || len(resp.ImageFilesystems) != 1 {
		t.Fatalf("ImageFsInfo: %v, %v", resp, err)
	}
	fsys := resp.ImageFilesystems[0]
	if root := filepath.Join(n.Dir, "gantry"); fsys.FsId.GetMountpoint() != root {
		t.Errorf("images lie on %q, want %s", fsys.FsId.GetMountpoint(), root)
	}
	// CRI adds up what all snapshots use: the layer files and what the containers wrote.
	disk := onDisk(t, filepath.Join(n.Dir, "gantry", "snapshots"))
	if used := int64(fsys.UsedBytes.GetValue()); used < disk*9/10 || used > disk*11/10 {
		t.Errorf("images use %d bytes, want about %d", used, disk)
	}
}

// checkCRIFreed wants nothing of the image to be left but what the pause image has, too.
func checkCRIFreed(t *testing.T, n *criNode, im *harness.Image) {
	t.Helper()
	list, err := n.ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil || len(list.Images) != 1 { // pause
		t.Errorf("ListImages: %v, %v, want the pause image alone", list, err)
	}
	if n.Snapshotter != harness.Gantry {
		return
	}
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the image's files to be removed", func() error {
		for _, l := range im.Layers[1:] { // the pause image has the first
			for _, sub := range []string{"blobs", "discarded"} {
				path := filepath.Join(n.Dir, "gantry", "content", sub, "sha256", l.Digest.Encoded())
				if _, err := os.Stat(path); err == nil {
					return fmt.Errorf("%s is there", path)
				}
			}
		}
		files := layerFiles(t, n.Node)
		if len(files) != 1 {
			return fmt.Errorf("layer files: %v, want pause's", files)
		}
		return nil
	})
}

// TestSharedLayerIsNotFetchedAgain pulls an image of which the node has the lowest layer as a snapshot, but not as a blob
// any more. containerd never has all blobs of such an image; removed, it leaves no more than others.
func TestSharedLayerIsNotFetchedAgain(t *testing.T) {
	n := newCRI(t, "discard_unpacked_layers = true", harness.Options{})
	one, ref := push(t, n.registry, n.proxy.Host(), "one", small(63, 1<<20))
	_, other := push(t, n.registry, n.proxy.Host(), "other", small(64, 1<<20))
	shared := one.Layers[0].Digest
	n.criPull(t, ref)
	if n.proxy.SentBlob(shared) == 0 {
		t.Fatal("the first image was pulled without its lowest layer")
	}
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Gantryd().Stop(); err != nil { // it would have the bytes for a moment
		t.Fatal(err)
	}
	if err := n.StartGantryd(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.proxy.Forget()
	n.criPull(t, other)
	for _, image := range []string{ref, other} {
		if _, err := n.CRI.RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}}); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.CollectGarbage(t.Context()); err != nil {
		t.Fatal(err)
	}
	checkEmpty(t, n.Node)
	if sent := n.proxy.SentBlob(shared); sent > 0 {
		t.Errorf("%d bytes of the shared layer were fetched again", sent)
	}
}

// TestCRILogin pulls with the credentials that a kubelet takes from a pod's pull secret, which gantry does not know:
// containerd fetches with them. Wrong ones fail at once, and the pod's events say why.
func TestCRILogin(t *testing.T) {
	user, secret, _ := strings.Cut(login, ":")
	for name, o := range map[string]harness.FaultOptions{"basic": {Basic: login}, "token": {Basic: login, Bearer: true}} {
		t.Run(name, func(t *testing.T) {
			im, err := harness.Build(t.Context(), filepath.Join(t.TempDir(), "image"), small(62, 4<<20))
			if err != nil {
				t.Fatal(err)
			}
			f := newFaultRegistry(t, o)
			n := newCRI(t, "", harness.Options{})
			if err := n.AddRegistry("http", f.Host()); err != nil {
				t.Fatal(err)
			}
			spec := &cri.ImageSpec{Image: f.AddImage(im, "private", "test")}
			for what, auth := range map[string]*cri.AuthConfig{"no": nil, "a wrong": {Username: user, Password: "wrong"}} {
				_, err := n.PullImage(t.Context(), &cri.PullImageRequest{Image: spec, Auth: auth})
				if err == nil || !strings.Contains(err.Error(), "authorization failed") && !strings.Contains(err.Error(), "401") {
					t.Errorf("with %s password: %v, want that the authorization failed", what, err)
				}
			}
			if _, err := n.PullImage(t.Context(), &cri.PullImageRequest{Image: spec, Auth: &cri.AuthConfig{Username: user, Password: secret}}); err != nil {
				t.Fatal(err)
			}
			pod, config := n.pod(t, "private")
			c := n.container(t, pod, config, "one", spec.Image)
			if got := n.exec(t, c, "/helper", "cat", "/etc/link"); got != "62" {
				t.Errorf("exec printed %q, want 62", got)
			}
			n.removePod(t, pod)
			checkNoSecret(t, n.Node, secret)
		})
	}
}

// checkNoSecret wants no log of gantryd to hold the password.
func checkNoSecret(t *testing.T, n *harness.Node, secret string) {
	t.Helper()
	if n.Gantryd() == nil {
		return
	}
	log, err := os.ReadFile(n.Gantryd().Log())
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(log, []byte(secret)) {
		t.Error("gantryd's log holds the password")
	}
}
