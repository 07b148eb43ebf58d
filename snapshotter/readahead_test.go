package snapshotter

import (
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A mount from files reads ahead as far as we say. Other processes may mount at the same time: one of the new settings is ours.
func TestReadAhead(t *testing.T) {
	dir := t.TempDir()
	before, err := mountedFromFiles()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeProbe(dir); err != nil {
			t.Error(err)
		}
	})
	if _, err := makeProbe(t.Context(), dir, ModeFile); err != nil {
		t.Fatal(err)
	}
	after, err := mountedFromFiles()
	if err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(after, func(name string, _ bool) bool { return before[name] })
	found := map[string]string{}
	for name := range after {
		data, err := os.ReadFile(filepath.Join(bdiClass, name, "read_ahead_kb"))
		if err != nil {
			continue // another one's, unmounted again
		}
		if found[name] = strings.TrimSpace(string(data)); found[name] == "1024" {
			return
		}
	}
	t.Errorf("read-ahead of new mounts in KiB: %v, want one of 1024", found)
}
