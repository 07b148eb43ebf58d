package transfer

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// keptOf picks what nobody in the process joined.
func keptOf(m *Manager) map[Blob]Status {
	list := map[Blob]Status{}
	for _, s := range m.List() {
		if s.Phase == PhaseKept {
			list[Blob{s.Digest, s.Size}] = s
		}
	}
	return list
}

// TestKept has a manager come after another: it shows what that one left, until somebody joins it or links it.
func TestKept(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	partData, part := randomBlob(1, 5<<20+1)
	doneData, done := randomBlob(2, 2<<20)
	goneData, gone := randomBlob(3, 1<<20)
	_, empty := randomBlob(4, 1<<20)
	m := newManager(t, root, lockOptions)
	h := join(t, m, part, &fakeSource{host: "a", data: partData, reply: stopAfter(3 << 20)})
	if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	wait(t, join(t, m, done, &fakeSource{host: "a", data: doneData}))
	linked := join(t, m, gone, &fakeSource{host: "a", data: goneData})
	wait(t, linked)
	if err := linked.LinkTo(filepath.Join(root, "link")); err != nil {
		t.Fatal(err)
	}
	if err := join(t, m, empty).Wait(t.Context()); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	if l := keptOf(m); len(l) != 0 {
		t.Errorf("joined in this process and shown as kept: %+v", l)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	written := time.Now().Add(-time.Hour).Truncate(time.Second)
	if err := os.Chtimes(filepath.Join(filepath.Dir(dataPath(m, part)), stateName), written, written); err != nil {
		t.Fatal(err)
	}

	m = newManager(t, root, lockOptions)
	for range 2 { // read, remembered
		l := keptOf(m)
		if p := l[part]; len(l) != 2 || p.Received < 3<<20 || p.Frontier < 3<<20 || p.Received >= part.Size || !p.Started.Equal(written) {
			t.Errorf("kept: %+v", l)
		}
		if d := l[done]; d.Received != done.Size || d.Frontier != done.Size {
			t.Errorf("kept and complete: %+v", d)
		}
	}
	before := keptOf(m)[part].Received
	src := &fakeSource{host: "a", data: partData, reply: stopAfter(4 << 20)}
	h = join(t, newManager(t, root, lockOptions), part, src)
	if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	if now := keptOf(m)[part].Received; now != before+sentBy(src) {
		t.Errorf("%d bytes after %d more by another process, %d before", now, sentBy(src), before)
	}
	wait(t, join(t, m, part, &fakeSource{host: "a", data: partData}))
	if l := keptOf(m); len(l) != 1 {
		t.Errorf("joined and shown as kept: %+v", l)
	}
}

// TestFinishedByAnother finds a blob that another process left complete: it costs one look at its bytes and no request,
// and stays for KeepPartial until somebody links it.
func TestFinishedByAnother(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	data, b := randomBlob(5, 3<<20+5)
	m := newManager(t, root, lockOptions)
	wait(t, join(t, m, b, &fakeSource{host: "a", data: data}))
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	left := copyRoot(t, root) // without the locks and memories of this process
	o := lockOptions
	o.KeepPartial, o.Grace = time.Hour, time.Nanosecond
	m = newManager(t, left, o)
	if err := m.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	src := &fakeSource{host: "a", data: data}
	h := join(t, m, b, src)
	complete(t, h, data)
	if calls, _ := src.stats(); calls != 0 {
		t.Errorf("%d requests for a blob that is there", calls)
	}
	_ = h.Close()
	old := time.Now().Add(-2 * time.Hour)
	dir := filepath.Dir(dataPath(m, b))
	if err := errors.Join(os.Chtimes(filepath.Join(dir, dataName), old, old), os.Chtimes(filepath.Join(dir, stateName), old, old)); err != nil {
		t.Fatal(err)
	}
	if err := m.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("swept although it is linked: %v", err)
	}
}

// TestSweepPrivate sweeps the folders that were made beside a stuck holder's, and keeps those in use.
func TestSweepPrivate(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(6, 4<<20)
	o := lockOptions
	o.KeepPartial = time.Nanosecond
	m := newManager(t, t.TempDir(), o)
	patient := newManager(t, m.root, lockOptions)
	h := join(t, m, b, &fakeSource{host: "a", data: data, reply: newGate(1 << 20).reply})
	frontierOf(t, h, 1<<20)
	w := newHandWritten(t, m.root, privateName(b, 1), data)
	w.block(0, w.right(0))
	folders := func() []string {
		names, err := filepath.Glob(filepath.Join(m.root, "sha256-*"))
		if err != nil {
			t.Fatal(err)
		}
		return names
	}
	if err := errors.Join(m.Sweep(t.Context()), m.Forget(b.Digest)); err != nil || len(folders()) != 2 {
		t.Fatalf("in use and swept: %v, %v left", err, folders())
	}
	w.end()
	if err := patient.Sweep(t.Context()); err != nil || len(folders()) != 2 {
		t.Errorf("too young: %v, %v left", err, folders())
	}
	if err := m.Sweep(t.Context()); err != nil || len(folders()) != 1 {
		t.Errorf("private folder of a process that ended: %v, %v left", err, folders())
	}
	if err := errors.Join(m.Close(), m.Forget(b.Digest)); err != nil || len(folders()) != 0 {
		t.Errorf("after Forget: %v, %v left", err, folders())
	}
	if locks, err := os.ReadDir(filepath.Join(m.root, locksName)); err != nil || len(locks) != 0 {
		t.Errorf("locks left: %v %v", locks, err)
	}
}

// TestKeptAfterFailure has another process go on with a blob that failed here: what is on disk is shown, with the error.
func TestKeptAfterFailure(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	data, b := randomBlob(5, 4<<20)
	m := newManager(t, root, lockOptions)
	if err := join(t, m, b).Wait(t.Context()); !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	other := newManager(t, root, lockOptions)
	if err := join(t, other, b, &fakeSource{host: "a", data: data, reply: stopAfter(2 << 20)}).Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if l := m.List(); len(l) != 1 || l[0].Phase != PhaseFailed || l[0].Err == nil || l[0].Received < 2<<20 || l[0].Frontier < 2<<20 {
		t.Errorf("got %+v, want a failure, and the 2 MiB that another process has left", l)
	}
}
