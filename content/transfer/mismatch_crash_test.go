package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// TestEarlierTransferLied has wrong bytes come from a process before: the host gets its fair try.
func TestEarlierTransferLied(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(20, 8<<20)
	root := t.TempDir()
	m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
	liar := newFlipper("a", data, map[int64]func(int) byte{blockSize: always, 5 * blockSize: always})
	liar.reply = stopAfter(4 << 20)
	h := join(t, m, b, liar)
	if err := h.Wait(t.Context()); !errdefs.IsPermissionDenied(err) {
		t.Fatal(err)
	}
	_ = h.Close()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name     string
		rotten   bool // the fourth block, and one of those that are wrong
		wrong    map[int64]func(int) byte
		more     int64
		verdicts []verdict
	}{
		{"good now", false, nil, 0, []verdict{{"an earlier transfer", 2, blockSize}}},
		{
			"a block is fetched again, and wrong", true, map[int64]func(int) byte{3 * blockSize: times(1)}, 2 * blockSize,
			[]verdict{{"a", 1, 3 * blockSize}, {"an earlier transfer", 1, blockSize}},
		},
		{
			"wrong once more, elsewhere", false, map[int64]func(int) byte{2 * blockSize: times(1)}, 3 * blockSize,
			[]verdict{{"a", 1, 2 * blockSize}, {"an earlier transfer", 2, blockSize}},
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			src := newFlipper("a", data, tc.wrong)
			root := copyRoot(t, root)
			m := newManager(t, root, Options{})
			if tc.rotten {
				damage(t, filepath.Dir(dataPath(m, b)), func(data, _ *os.File) error {
					return errors.Join(flipAt(data, 3*blockSize+1), flipAt(data, 5*blockSize+1))
				})
			}
			h, l := joinLogged(t, m, b, src)
			if got, _, err := rereads(t, h); err != nil || !bytes.Equal(got, data) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
			wait(t, h)
			if _, sent := src.stats(); sent != b.Size/2+b.Size+tc.more {
				t.Errorf("sent %d, want half of %d, all of it and %d", sent, b.Size, tc.more)
			}
			if v := l.verdicts(); !slices.Equal(v, tc.verdicts) {
				t.Errorf("the log names %+v, want %+v", v, tc.verdicts)
			}
		})
	}
}

// TestCrashAfterMismatch copies the root, as SIGKILL would leave it, in the middle of the second and of the third try:
// the next process fetches what is missing of that try and nothing else.
func TestCrashAfterMismatch(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(21, 8<<20)
	src := newFlipper("a", data, map[int64]func(int) byte{0: times(1), 7 << 20: times(2)})
	at, resume := make(chan struct{}), make(chan struct{})
	src.reply = func(ctx context.Context, call int, _, _ int64) (fakeReply, error) {
		if call == 8+4+1 || call == 8+8+1 || call == 8+8+2 { // half-way through the second; both of the third
			select {
			case at <- struct{}{}:
				<-resume
			case <-ctx.Done():
			}
		}
		return fakeReply{}, nil
	}
	root := t.TempDir()
	h := join(t, newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1}), b, src)
	for i, missing := range []int64{4 << 20, 2 * blockSize, blockSize} {
		<-at
		if i > 0 { // the blocks that stay are counted again
			eventually(t, "the rest was checked", func() bool { return h.m.List()[0].Received == b.Size-missing })
		}
		crashed := copyRoot(t, root)
		resume <- struct{}{}
		good := &fakeSource{host: "b", data: data}
		c := join(t, newManager(t, crashed, Options{}), b, good)
		wait(t, c)
		if _, sent := good.stats(); sent != missing {
			t.Errorf("crash %d: fetched %d bytes, want %d", i, sent, missing)
		}
	}
	wait(t, h)
}

// TestDataChangedHere has a bit flip on this machine, after the bytes had arrived: no host is blamed.
func TestDataChangedHere(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(22, 4<<20)
	hold := make(chan struct{})
	src := &fakeSource{host: "a", data: data}
	src.reply = func(ctx context.Context, call int, off, _ int64) (fakeReply, error) {
		if off == 0 {
			select {
			case <-hold:
			case <-ctx.Done():
			}
		}
		return fakeReply{}, nil
	}
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 4})
	m.shared.hosts.learnRanges(m.shared.hosts.host("a"), true)
	h, l := joinLogged(t, m, b, src)
	eventually(t, "all but the first chunk", func() bool { return m.List()[0].Received == 3<<20 })
	f, err := os.OpenFile(dataPath(m, b), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(flipAt(f, 2<<20), f.Close()); err != nil {
		t.Fatal(err)
	}
	close(hold)
	wait(t, h)
	if !l.says("this machine") || len(l.verdicts()) > 0 || m.shared.lied("a") {
		t.Errorf("the log says %+v", l.entries)
	}
}

// TestAskedAloneInVain has hosts fail when they are asked for the whole blob alone.
func TestAskedAloneInVain(t *testing.T) {
	t.Parallel()
	silent := func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
		<-ctx.Done()
		return fakeReply{}, context.Cause(ctx)
	}
	t.Run("the next one is good", func(t *testing.T) {
		t.Parallel()
		synctest.Test(t, func(t *testing.T) {
			data, b := randomBlob(23, 4<<20)
			liar := newFlipper("a", data, map[int64]func(int) byte{5: always})
			dead := &fakeSource{host: "b", reply: silent}
			good, goOn := &fakeSource{host: "c", data: data}, make(chan struct{})
			good.reply = func(ctx context.Context, _ int, _, _ int64) (fakeReply, error) {
				select {
				case <-goOn:
				case <-ctx.Done():
				}
				return fakeReply{}, nil
			}
			joined := make(chan struct{})
			liar.reply = func(ctx context.Context, _ int, off, _ int64) (fakeReply, error) {
				if off == 3<<20 {
					select {
					case <-joined:
					case <-ctx.Done():
					}
				}
				return fakeReply{}, nil
			}
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
			h, l := joinLogged(t, m, b, liar)
			eventually(t, "all but the last chunk", func() bool { return h.Frontier() == 3<<20 })
			join(t, m, b, dead, good) // too late to have a part in the first try
			close(joined)
			time.Sleep(3 * time.Minute)
			eventually(t, "the last host's turn", func() bool {
				calls, _ := good.stats()
				return calls > 0
			})
			if late := join(t, m, b); late.job != h.job {
				t.Error("who comes late does not join it")
			}
			close(goOn)
			wait(t, h)
			if v := l.verdicts(); !slices.Equal(v, []verdict{{"a", 1, 0}}) {
				t.Errorf("the log names %+v", v)
			}
		})
	})
	t.Run("it refuses half-way", func(t *testing.T) {
		t.Parallel()
		data, b := randomBlob(24, 4<<20)
		root := t.TempDir()
		src := newFlipper("a", data, map[int64]func(int) byte{5: times(1)})
		src.reply = func(_ context.Context, call int, _, _ int64) (fakeReply, error) {
			if call > 4+2 {
				return fakeReply{}, errdefs.ErrPermissionDenied
			}
			return fakeReply{}, nil
		}
		m := newManager(t, root, Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
		h := join(t, m, b, src)
		err := h.Wait(t.Context())
		if errdefs.IsDataLoss(err) || !errdefs.IsPermissionDenied(err) || !strings.Contains(err.Error(), "digest mismatch: a sent") {
			t.Errorf("got %v, want a refusal that tells of the mismatch and claims no more", err)
		}
		_ = h.Close()
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		again := &fakeSource{host: "a", data: data}
		wait(t, join(t, newManager(t, root, Options{}), b, again))
		if _, sent := again.stats(); sent != 2<<20 {
			t.Errorf("what the second try brought is lost: fetched %d", sent)
		}
	})
}

func TestServed(t *testing.T) {
	t.Parallel()
	var s served
	s.note(5, "b")
	s.note(5, "a")
	s.note(6, "b")
	s.inherit(6)
	s.inherit(7)
	s.note(7, "a")
	for block, want := range map[uint32]string{0: "", 5: "a and b", 6: "b", 7: "a and an earlier transfer", 8: ""} {
		if got := strings.Join(s.names(s.code(block)), " and "); got != want {
			t.Errorf("block %d: %q, want %q", block, got, want)
		}
	}
	if got := s.everybody(); got != "a and b and an earlier transfer" {
		t.Error(got)
	}
	s.forget(5)
	s.forget(99)
	if s.code(5) != byNobody {
		t.Error("not forgotten")
	}
	// More hosts, and more sets of them, than a byte can tell apart.
	for i := range uint32(100) {
		for k := range i % 50 {
			s.note(i, fmt.Sprint("host", (i*7+k*k)%90))
		}
	}
	for i := range uint32(100) {
		if n := len(s.names(s.code(i))); (n == 0) != (i%50 == 0) && (i < 6 || i > 7) {
			t.Errorf("block %d: %d names", i, n)
		}
	}
	if len(s.sets) > maxCodes || len(s.hosts) > maxHosts {
		t.Errorf("%d sets of %d hosts", len(s.sets), len(s.hosts))
	}
}
