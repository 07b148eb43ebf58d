package crashfs

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// show lists the files of a saved state with what they hold.
func show(t *testing.T, dir string) []string {
	t.Helper()
	var list []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		if d.IsDir() {
			list = append(list, rel+"/")
			return nil
		}
		if d.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(path)
			list = append(list, rel+" -> "+target)
			return err
		}
		p, err := os.ReadFile(path)
		list = append(list, rel+"="+string(p))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// Each step is done, and then the power fails: what must be there, and what may.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	if !Alone(t) {
		return
	}
	dir := t.TempDir()
	fsys, err := Mount(dir)
	must(t, err)
	t.Cleanup(func() { must(t, fsys.Close()) })
	scratch := t.TempDir()
	unmount, err := Memory(scratch)
	must(t, err)
	t.Cleanup(func() { must(t, unmount()) })
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, text string) func() error {
		return func() error { return os.WriteFile(in(name), []byte(text), 0o600) }
	}
	synced := func(name string) func() error { return func() error { return syncPath(in(name)) } }

	steps := []struct {
		what        string
		do          func() error
		least, most []string
	}{
		{"a file", write("a", "one"), nil, []string{"a=one"}},
		{"its bytes", synced("a"), nil, []string{"a=one"}},
		{"its name", synced(""), []string{"a=one"}, []string{"a=one"}},
		{"other bytes", write("a", "other"), []string{"a=one"}, []string{"a=other"}},
		{"one more", write("b", "two"), []string{"a=one"}, []string{"a=other", "b=two"}},
		{"its name alone", synced(""), []string{"a=one", "b="}, []string{"a=other", "b=two"}},
		{"a folder", func() error { return os.Mkdir(in("d"), 0o700) }, []string{"a=one", "b="}, []string{"a=other", "b=two", "d/"}},
		{"a rename", func() error { return os.Rename(in("b"), in("d/b")) }, []string{"a=one", "b="}, []string{"a=other", "d/", "d/b=two"}},
		{"one of its folders", synced("d"), []string{"a=one", "d/", "d/b="}, []string{"a=other", "d/", "d/b=two"}},
		{"a link", func() error { return os.Link(in("d/b"), in("c")) }, []string{"a=one", "d/", "d/b="}, []string{"a=other", "c=two", "d/", "d/b=two"}},
		{"the bytes of both", synced("c"), []string{"a=one", "d/", "d/b=two"}, []string{"a=other", "c=two", "d/", "d/b=two"}},
		{"a removal", func() error { return os.Remove(in("d/b")) }, []string{"a=one", "d/", "d/b=two"}, []string{"a=other", "c=two", "d/"}},
		{"the other folder", synced(""), []string{"a=one", "c=two", "d/", "d/b=two"}, []string{"a=other", "c=two", "d/"}},
		{"no folder", func() error { return os.Remove(in("d")) }, []string{"a=one", "c=two", "d/", "d/b=two"}, []string{"a=other", "c=two"}},
		{"that it is gone", synced(""), []string{"a=one", "c=two"}, []string{"a=other", "c=two"}},
		{"a symlink", func() error { return os.Symlink("c", in("s")) }, []string{"a=one", "c=two"}, []string{"a=other", "c=two", "s -> c"}},
		{"its name too", synced(""), []string{"a=one", "c=two", "s -> c"}, []string{"a=other", "c=two", "s -> c"}},
	}
	for _, s := range steps {
		if err := s.do(); err != nil {
			t.Fatalf("%s: %v", s.what, err)
		}
		fsys.Mark(s.what)
	}
	log := fsys.Log()
	for i, cut := range log.Marked() {
		for name, want := range map[string][]string{"least": steps[i].least, "most": steps[i].most} {
			state := log.Least(cut)
			if name == "most" {
				state = log.Most(cut)
			}
			folder := filepath.Join(scratch, fmt.Sprintf("%s-%d", name, i))
			must(t, state.Save(folder))
			if got := show(t, folder); !slices.Equal(got, want) {
				t.Errorf("%s: %s is %q, wanted %q", steps[i].what, name, got, want)
			}
		}
	}
	if got := log.Marks(len(log)); len(got) != len(steps) {
		t.Errorf("marks %q", got)
	}
}

// What is safe is in each of the states between.
func TestTorn(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	safe, all := bytes.Repeat([]byte{1}, 5*sector), bytes.Repeat([]byte{1}, 9*sector)
	for i := 2 * sector; i < len(all); i++ {
		all[i] = 2
	}
	kinds := map[string]bool{}
	for range 1000 {
		p := torn(safe, all, r)
		if len(p) < len(safe) || len(p) > len(all) || !bytes.Equal(p[:2*sector], safe[:2*sector]) {
			t.Fatalf("%d bytes, safe were %d, written %d", len(p), len(safe), len(all))
		}
		for off := 2 * sector; off < len(p); off += sector {
			s := p[off:min(off+sector, len(p))]
			if bytes.Count(s, s[:1]) != len(s) {
				t.Fatalf("the sector at %d is of two kinds", off)
			}
			kinds[fmt.Sprint(off < len(safe), s[0])] = true
		}
	}
	for _, want := range []string{"true 1", "true 2", "false 0", "false 2"} {
		if !kinds[want] {
			t.Errorf("no sector was ever %q", want)
		}
	}
}
