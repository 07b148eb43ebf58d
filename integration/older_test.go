package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/gantryd/gantry/integration/harness"
)

// TestOlderContainerd has the same drop-in serve the last two lines of containerd before the newest: pods, pulls by ctr
// both ways, push, export and import, and removal.
func TestOlderContainerd(t *testing.T) {
	for _, line := range []string{"2.3", "2.2"} {
		t.Run(line, func(t *testing.T) {
			n := newCRI(t, "", harness.Options{Line: line})
			version, err := n.Ctr(t.Context(), "default", "version")
			if err != nil || strings.Count(version, "v"+line+".") != 2 {
				t.Fatalf("ctr and containerd are %s (%v), want %s", version, err, line)
			}
			checkCRI(t, n)
			var refs []string
			for j, args := range [][]string{nil, {"--local"}} {
				seed := uint64(1 + j)
				im, ref := push(t, n.registry, n.proxy.Host(), fmt.Sprint("line", seed), small(seed, 4<<20))
				mustPull(t, n.Node, "default", ref, args...)
				if snapshotter == harness.Gantry {
					im.Layers = im.Layers[1:] // the first is the pause image's
					checkBlobBytes(t, n.proxy, im, 1)
				}
				checkImage(t, n.Node, "default", ref)
				mustRun(t, n.Node, "default", ref, fmt.Sprint(seed), "/helper", "cat", "/etc/link")
				refs = append(refs, ref)
			}
			checkLeaves(t, n.Node, n.registry, refs[0])
			for _, ref := range refs {
				if err := n.RemoveImage(t.Context(), "default", ref); err != nil {
					t.Fatal(err)
				}
			}
			if err := n.RemoveImage(t.Context(), "imported", refs[0]); err != nil {
				t.Fatal(err)
			}
			for _, what := range [][]string{{"content", "ls", "-q"}, {"snapshot", "--snapshotter", n.Snapshotter, "ls"}} {
				if out, err := n.Ctr(t.Context(), "default", what...); err != nil || strings.Contains(out, "sha256:") {
					t.Errorf("ctr %s: %v\n%s", strings.Join(what, " "), err, out)
				}
			}
		})
	}
}

// TestOlderConfig imports the drop-in into a config.toml of version 2, as containerd 1.x had it: what that says of CRI stays.
// containerd 2.2 forgets it as soon as anything of version 3 is imported, and is to migrate its file first.
func TestOlderConfig(t *testing.T) {
	needGantry(t)
	for _, tc := range []struct {
		line    string
		migrate bool
		keeps   bool
	}{
		{"", false, true},
		{"2.3", false, true},
		{"2.2", false, false},
		{"2.2", true, true},
	} {
		t.Run(fmt.Sprintf("%q migrate %t", tc.line, tc.migrate), func(t *testing.T) {
			dir := t.TempDir()
			file, dropIn := filepath.Join(dir, "config.toml"), filepath.Join(dir, "gantry.toml")
			write(t, filepath.Join(dir, "gantryd.toml"), "")
			write(t, dropIn, program(t, "gantry", "--config", filepath.Join(dir, "gantryd.toml"), "config", "containerd"))
			imports := fmt.Sprintf("imports = [%q]\n", dropIn)
			const version2 = "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc.options]\nSystemdCgroup = true\n"
			containerd := filepath.Join("v"+tc.line, "containerd")
			if tc.line == "" {
				containerd = "containerd"
			}
			write(t, file, "version = 2\n"+imports+version2)
			if tc.migrate {
				write(t, file, "version = 2\n"+version2)
				migrated := program(t, containerd, "--config", file, "config", "migrate")
				const before = "imports = ['/etc/containerd/conf.d/*.toml']\n"
				if !strings.Contains(migrated, before) {
					t.Fatalf("what is migrated has not %s", before)
				}
				write(t, file, strings.Replace(migrated, before, imports, 1))
			}
			dump := program(t, containerd, "--config", file, "config", "dump")
			if !strings.Contains(dump, "snapshotter = 'gantry'") {
				t.Error("the drop-in is not in")
			}
			if got := strings.Contains(dump, "SystemdCgroup = true"); got != tc.keeps {
				t.Errorf("the setting of version 2 is in: %t, want %t", got, tc.keeps)
			}
		})
	}
}

func write(t *testing.T, file, data string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
}

// program runs one of gantry's or its peers' and returns what it prints.
func program(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := harness.Program(name)
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), path, args...).Output()
	if err != nil {
		t.Fatalf("%s %q: %v", name, args, err)
	}
	return string(out)
}
