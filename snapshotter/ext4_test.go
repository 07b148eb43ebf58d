package snapshotter

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestTemplates asks e2fsck, which checks every checksum, whether copies of
// templates are clean file systems, and that no two have the same UUID.
func TestTemplates(t *testing.T) {
	t.Parallel()
	made, err := newTemplates(mkfsPlaces)
	if err != nil {
		t.Fatal(err)
	}
	uuids := map[string]bool{}
	for _, size := range []int64{MinUpperSize, 64<<20 + ext4Block, 1 << 30, DefaultUpperSize, 100 << 30} {
		for range 2 {
			tmpl, err := made.get(t.Context(), size)
			if err != nil {
				t.Fatal(err)
			}
			name := filepath.Join(t.TempDir(), fmt.Sprint(size))
			f, err := os.Create(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(tmpl.write(f), f.Close()); err != nil {
				t.Fatal(err)
			}
			if out, err := exec.CommandContext(t.Context(), "e2fsck", "-f", "-n", name).CombinedOutput(); err != nil || bytes.Contains(out, []byte("Fix?")) {
				t.Errorf("%d bytes: e2fsck: %v\n%s", size, err, out)
			}
			super, err := readSuperblock(name)
			if err != nil || super == nil {
				t.Fatalf("%d bytes: superblock %v, %v", size, super, err)
			}
			uuids[string(super[ext4UUID:ext4UUID+ext4IDSize])] = true
			fi, err := os.Stat(name)
			if err != nil || fi.Size() != size {
				t.Errorf("the file has %d bytes, want %d (%v)", fi.Size(), size, err)
			}
			t.Logf("%d bytes: %d in %d extents are not zero", size, tmpl.bytes(), len(tmpl.extents))
			if most := int64(256<<10) + size>>16; tmpl.bytes() > most {
				t.Errorf("%d bytes: %d bytes of metadata, want %d at most", size, tmpl.bytes(), most)
			}
		}
	}
	if len(uuids) != 10 {
		t.Errorf("%d different UUIDs in 10 file systems", len(uuids))
	}
}

func (t *template) bytes() (n int64) {
	for _, e := range t.extents {
		n += int64(len(e.data))
	}
	return n
}

func TestTemplatesKept(t *testing.T) {
	t.Parallel()
	made, err := newTemplates(mkfsPlaces)
	if err != nil {
		t.Fatal(err)
	}
	size := func(i int) int64 { return MinUpperSize + int64(i)*ext4Block }
	for i := range keptTemplates + 1 {
		if _, err := made.get(t.Context(), size(0)); err != nil { // stays in use
			t.Fatal(err)
		}
		if _, err := made.get(t.Context(), size(i)); err != nil {
			t.Fatal(err)
		}
	}
	if len(made.kept) != keptTemplates || made.find(size(0)) == nil || made.find(size(1)) != nil {
		t.Errorf("%d templates are kept; the one in use: %v; the oldest: %v", len(made.kept), made.find(size(0)) != nil, made.find(size(1)) != nil)
	}
}

func TestTemplatesFail(t *testing.T) {
	t.Parallel()
	script := func(body string) []string {
		name := filepath.Join(t.TempDir(), "mkfs.ext4")
		if err := os.WriteFile(name, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return []string{name}
	}
	for name, tt := range map[string]struct {
		places []string
		want   string
	}{
		"not installed":  {[]string{"/nowhere/mkfs.ext4"}, "mkfs.ext4 is not installed (package e2fsprogs)"},
		"refuses":        {script("echo no such feature; exit 1"), "no such feature"},
		"does nothing":   {script("exit 0"), "made no superblock"},
		"something else": {script("echo hello | dd of=/proc/self/fd/3 conv=notrunc 2>&1"), "made no superblock"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			made, err := newTemplates(tt.places)
			if err == nil {
				_, err = made.get(t.Context(), MinUpperSize)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}
