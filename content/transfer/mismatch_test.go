package transfer

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// flipper is a host that gets bytes wrong. wrong says, by offset, what the nth reply with that byte does to it: n from 1,
// 0 leaves it alone.
type flipper struct {
	*fakeSource
	wrong map[int64]func(n int) byte

	mu     sync.Mutex
	passed map[int64]int
	lies   []int64 // offsets of the bytes it got wrong, in order
}

func newFlipper(host string, data []byte, wrong map[int64]func(n int) byte) *flipper {
	return &flipper{fakeSource: &fakeSource{host: host, data: data}, wrong: wrong, passed: map[int64]int{}}
}

// times flips a bit the nth times that a byte is sent.
func times(ns ...int) func(int) byte {
	return func(n int) byte {
		if slices.Contains(ns, n) {
			return 1
		}
		return 0
	}
}

func always(int) byte { return 1 }

func (s *flipper) Open(ctx context.Context, off, n int64) (Body, error) {
	b, err := s.fakeSource.Open(ctx, off, n)
	if err == nil {
		b.ReadCloser = &flipBody{ReadCloser: b.ReadCloser, src: s, pos: b.Off}
	}
	return b, err
}

type flipBody struct {
	io.ReadCloser
	src *flipper
	pos int64
}

func (b *flipBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	s := b.src
	s.mu.Lock()
	defer s.mu.Unlock()
	for off, f := range s.wrong {
		if i := off - b.pos; i >= 0 && i < int64(n) {
			s.passed[off]++
			if x := f(s.passed[off]); x != 0 {
				p[i] ^= x
				s.lies = append(s.lies, off)
			}
		}
	}
	b.pos += int64(n)
	return n, err
}

// logged collects what is said at info and above.
type logged struct {
	mu      sync.Mutex
	entries []*log.Entry
}

func (l *logged) Levels() []logrus.Level { return []logrus.Level{logrus.InfoLevel, logrus.WarnLevel} }

func (l *logged) Fire(e *log.Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.entries = append(l.entries, e)
	return nil
}

// verdicts lists whom the log names for wrong bytes.
func (l *logged) verdicts() []verdict {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []verdict
	for _, e := range l.entries {
		if strings.Contains(e.Message, "sent wrong bytes") {
			all = append(all, verdict{hosts: e.Data["host"].(string), blocks: e.Data["blocks"].(int), first: e.Data["offset"].(int64)})
		}
	}
	return all
}

func (l *logged) says(text string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.ContainsFunc(l.entries, func(e *log.Entry) bool { return strings.Contains(e.Message, text) })
}

// messages lists what was said, in order.
func (l *logged) messages() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []string
	for _, e := range l.entries {
		all = append(all, e.Message)
	}
	return all
}

// joinLogged joins with a log that is captured.
func joinLogged(t *testing.T, m *Manager, b Blob, srcs ...Source) (*Handle, *logged) {
	t.Helper()
	l := &logged{}
	logger := logrus.New()
	logger.SetOutput(io.Discard)
	logger.AddHook(l)
	h, err := m.Join(log.WithLogger(t.Context(), logrus.NewEntry(logger)), "", b, srcs...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = h.Close() })
	return h, l
}

// rereads reads everything, from the start again as often as it must, and counts how often that is.
func rereads(t *testing.T, h *Handle) (got []byte, restarts int, err error) {
	t.Helper()
	for got, err = readAll(t, h); errors.Is(err, ErrRestarted); got, err = readAll(t, h) {
		restarts++
	}
	return got, restarts, err
}

// TestOneHostFlips has one host get single bytes wrong, and counts what it sends.
func TestOneHostFlips(t *testing.T) {
	t.Parallel()
	const x, y, z = 3*blockSize + 7, 9*blockSize + 7, 15*blockSize + 200_000
	for _, tc := range []struct {
		name     string
		wrong    map[int64]func(int) byte
		blocks   int64 // fetched beyond twice the blob
		restarts int
		verdicts []verdict // nil: it fails
	}{
		{"once", map[int64]func(int) byte{x: times(1)}, 0, 1, []verdict{{"a", 1, 3 * blockSize}}},
		{"three bytes once", map[int64]func(int) byte{x: times(1), y: times(1), y + 1: times(1)}, 0, 1, []verdict{{"a", 2, 3 * blockSize}}},
		{"twice, elsewhere", map[int64]func(int) byte{y: times(1), z: times(2)}, 2, 2, []verdict{{"a", 2, 9 * blockSize}}},
		{"twice, one byte in two ways", map[int64]func(int) byte{
			y: func(n int) byte { return []byte{1, 2, 0}[n-1] },
		}, 1, 2, []verdict{{"a", 2, 9 * blockSize}}},
		{"always the same", map[int64]func(int) byte{x: always}, 0, 2, nil},
		{"always the same, and one more once", map[int64]func(int) byte{x: always, y: times(1)}, 1, 3, nil},
		{"always differently", map[int64]func(int) byte{x: func(n int) byte { return byte(n) }}, 1, 3, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			data, b := randomBlob(10, 16*blockSize-5)
			src := newFlipper("a", data, tc.wrong)
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
			h, l := joinLogged(t, m, b, src)
			got, n, err := rereads(t, h)
			sent, restarts := 2*b.Size, h.job.currentGeneration()
			for i := range tc.blocks {
				sent += blockSize
				if tc.name == "twice, elsewhere" && i == 1 { // the blob's last block is shorter
					sent -= 5
				}
			}
			if _, s := src.stats(); s != sent {
				t.Errorf("sent %d bytes, want %d: twice the blob and %d", s, sent, sent-2*b.Size)
			}
			if restarts != tc.restarts || n > restarts {
				t.Errorf("%d restarts, %d of them noticed; want %d", restarts, n, tc.restarts)
			}
			_ = h.Wait(t.Context())
			if v := l.verdicts(); !slices.Equal(v, tc.verdicts) {
				t.Errorf("the log names %+v, want %+v", v, tc.verdicts)
			}
			if tc.verdicts != nil {
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("read %d bytes, %v", len(got), err)
				}
				wait(t, h)
				return
			}
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), b.Digest.String()) || !strings.Contains(err.Error(), "a sent") {
				t.Errorf("got %v, want data loss that names digest and host", err)
			}
			if _, err := os.Stat(dataPath(m, b)); !os.IsNotExist(err) {
				t.Errorf("the data was not dropped: %v", err)
			}
		})
	}
}

// TestPlainHostFlips has a host that ignores ranges: its third reply ends when nothing is missing any more.
func TestPlainHostFlips(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(11, 64*blockSize)
	src := newFlipper("a", data, map[int64]func(int) byte{2 * blockSize: times(1), 4 * blockSize: times(2)})
	src.reply = func(context.Context, int, int64, int64) (fakeReply, error) { return fakeReply{whole: true}, nil }
	h, l := joinLogged(t, newManager(t, t.TempDir(), Options{}), b, src)
	got, _, err := rereads(t, h)
	if err != nil || !bytes.Equal(got, data) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
	wait(t, h)
	if v := l.verdicts(); !slices.Equal(v, []verdict{{"a", 2, 2 * blockSize}}) {
		t.Errorf("the log names %+v", v)
	}
	if calls, sent := src.stats(); calls != 3 || sent < 2*b.Size+5*blockSize || sent > 3*b.Size {
		t.Errorf("%d requests brought %d bytes, want 3 and at most three times %d", calls, sent, b.Size)
	}
}

// TestReaderOfEachTry has a reader notice each of two restarts once: the whole again, and what differed.
func TestReaderOfEachTry(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(12, 8<<20)
	src := newFlipper("a", data, map[int64]func(int) byte{7<<20 + 5: times(1), 7<<20 + blockSize: times(2)})
	step := make(chan struct{})
	src.reply = func(ctx context.Context, _ int, off, _ int64) (fakeReply, error) {
		if off == 7<<20 {
			select {
			case <-step:
			case <-ctx.Done():
			}
		}
		return fakeReply{}, nil
	}
	h := join(t, newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20}), b, src)
	buf := make([]byte, 100)
	for try := range 3 {
		if _, err := h.ReadAt(t.Context(), buf, 0); err != nil {
			t.Fatalf("try %d: %v", try, err)
		}
		if _, err := h.ReadAt(t.Context(), buf, 1<<20); err != nil {
			t.Fatalf("try %d goes on: %v", try, err)
		}
		step <- struct{}{}
		if try == 2 {
			break
		}
		eventually(t, "a restart", func() bool { return h.job.currentGeneration() == try+1 })
		for range 2 {
			if _, err := h.ReadAt(t.Context(), buf, 2<<20); !errors.Is(err, ErrRestarted) {
				t.Errorf("try %d: %v, want ErrRestarted", try, err)
			}
		}
	}
	wait(t, h)
	if n, err := h.ReadAt(t.Context(), buf, 7<<20); err != nil || !bytes.Equal(buf[:n], data[7<<20:7<<20+n]) {
		t.Errorf("the end: %v", err)
	}
}

// halfLiar serves the first half of a blob with some bytes wrong, and then nothing any more.
func halfLiar(data []byte, wrong map[int64]func(int) byte) *flipper {
	s := newFlipper("mirror", data, wrong)
	s.reply = func(_ context.Context, _ int, off, _ int64) (fakeReply, error) {
		if off >= int64(len(data))/2 {
			return fakeReply{}, errdefs.ErrNotFound
		}
		return fakeReply{}, nil
	}
	return s
}

// TestLyingMirror has one of two hosts lie: the other is asked alone, and the log names the liar.
func TestLyingMirror(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(13, 32*blockSize)
	wrong := map[int64]func(int) byte{}
	for i := range int64(16) {
		wrong[i*blockSize+i] = always
	}
	for _, tc := range []struct {
		name string
		liar *flipper
	}{
		{"that serves all it is asked for", newFlipper("mirror", data, wrong)},
		{"that goes away", halfLiar(data, wrong)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			good := &fakeSource{host: "origin", tier: 1, data: data}
			good.reply = func(ctx context.Context, call int, off, _ int64) (fakeReply, error) {
				// Not before the mirror has had its chance.
				for call <= 32 && ctx.Err() == nil {
					if calls, _ := tc.liar.stats(); calls > 0 {
						break
					}
					_ = sleep(ctx, time.Millisecond)
				}
				return fakeReply{}, nil
			}
			m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
			h, l := joinLogged(t, m, b, tc.liar, good)
			got, _, err := rereads(t, h)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("read %d bytes, %v", len(got), err)
			}
			wait(t, h)
			_, sent := tc.liar.stats()
			_, more := good.stats()
			if sent+more != 2*b.Size {
				t.Errorf("sent %d and %d, want twice %d", sent, more, b.Size)
			}
			lies := tc.liar.lies
			want := []verdict{{"mirror", len(lies), slices.Min(lies) / blockSize * blockSize}}
			if v := l.verdicts(); !slices.Equal(v, want) {
				t.Errorf("the log names %+v, want %+v", v, want)
			}
		})
	}
}

// TestBothLie has two hosts of which neither is right at once, but one is on another try.
func TestBothLie(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(14, 32*blockSize)
	liar := halfLiar(data, map[int64]func(int) byte{5 * blockSize: always})
	flaky := newFlipper("origin", data, map[int64]func(int) byte{20 * blockSize: times(2)})
	flaky.tier = 1
	h, l := joinLogged(t, newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1}), b, liar, flaky)
	got, _, err := rereads(t, h)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("read %d bytes, %v", len(got), err)
	}
	wait(t, h)
	_, sent := liar.stats()
	_, more := flaky.stats()
	if want := 2*b.Size + 2*blockSize; sent+more != want {
		t.Errorf("sent %d and %d, want %d together", sent, more, want)
	}
	if v, want := l.verdicts(), []verdict{{"mirror", 1, 5 * blockSize}, {"origin", 1, 20 * blockSize}}; !slices.Equal(v, want) {
		t.Errorf("the log names %+v, want %+v", v, want)
	}
}

// TestThirdHostIsRight has two hosts lie for good. What either did in each of three tries is told by the fourth.
func TestThirdHostIsRight(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(25, 32*blockSize)
	one := halfLiar(data, map[int64]func(int) byte{5 * blockSize: always})
	two := newFlipper("b", data, map[int64]func(int) byte{20 * blockSize: always, 24 * blockSize: times(2)})
	two.tier = 1
	joined := make(chan struct{})
	ends := 0
	two.reply = func(ctx context.Context, _ int, off, _ int64) (fakeReply, error) {
		if off == 28*blockSize {
			if ends++; ends == 2 { // it is alone now
				select {
				case <-joined:
				case <-ctx.Done():
				}
			}
		}
		return fakeReply{}, nil
	}
	m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20, ConnectionsPerHost: 1})
	h, l := joinLogged(t, m, b, one, two)
	eventually(t, "the end of the second try", func() bool { return h.job.currentGeneration() == 1 && h.Frontier() == 28*blockSize })
	join(t, m, b, &fakeSource{host: "c", data: data})
	close(joined)
	wait(t, h)
	if v, want := l.verdicts(), []verdict{{"b", 4, 20 * blockSize}, {"mirror", 1, 5 * blockSize}}; !slices.Equal(v, want) {
		t.Errorf("the log names %+v, want %+v", v, want)
	}
}

// TestBlockOfTwoHosts has a block put together from pieces: one of the two lied, nobody knows which.
func TestBlockOfTwoHosts(t *testing.T) {
	t.Parallel()
	data, b := randomBlob(15, 4*blockSize)
	one := newFlipper("a", data, map[int64]func(int) byte{blockSize + 10: always})
	gone := make(chan struct{})
	one.reply = func(ctx context.Context, call int, _, _ int64) (fakeReply, error) {
		if call == 1 {
			return fakeReply{cut: blockSize + 1000}, nil
		}
		select {
		case <-gone:
		case <-ctx.Done():
		}
		return fakeReply{}, errdefs.ErrNotFound
	}
	two := &fakeSource{host: "b", data: data}
	m := newManager(t, t.TempDir(), Options{ChunkSize: 4 * blockSize, ConnectionsPerHost: 1})
	h, l := joinLogged(t, m, b, one)
	eventually(t, "the first host is gone", func() bool {
		calls, _ := one.stats()
		return calls > 0 && h.Frontier() == blockSize+1000
	})
	join(t, m, b, two)
	close(gone)
	wait(t, h)
	if v := l.verdicts(); !slices.Equal(v, []verdict{{"a and b", 1, blockSize}}) {
		t.Errorf("the log names %+v", v)
	}
	if m.shared.lied("a") || m.shared.lied("b") {
		t.Error("one is taken for a liar")
	}
}

// TestLiarIsAskedLast has a second blob start with the other host, though the one that lied comes first in order.
func TestLiarIsAskedLast(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		m := newManager(t, t.TempDir(), Options{ChunkSize: 1 << 20})
		fetch := func(seed byte, wrong map[int64]func(int) byte, down bool) (mirror, origin int64) {
			data, b := randomBlob(seed, 4<<20)
			one, two := newFlipper("mirror", data, wrong), &fakeSource{host: "origin", data: data}
			two.reply = func(context.Context, int, int64, int64) (fakeReply, error) {
				if calls, _ := one.stats(); down || wrong != nil && calls == 0 {
					return fakeReply{}, errReset
				}
				return fakeReply{}, nil
			}
			h := join(t, m, b, one, two)
			wait(t, h)
			_, mirror = one.stats()
			_, origin = two.stats()
			return mirror, origin
		}
		wrong := map[int64]func(int) byte{}
		for i := range int64(16) {
			wrong[i*blockSize] = always
		}
		if one, _ := fetch(16, wrong, false); one == 0 {
			t.Fatal("the liar was never asked")
		}
		if one, two := fetch(17, nil, false); one != 0 || two != 4<<20 {
			t.Errorf("the liar sent %d, the other %d", one, two)
		}
		if one, two := fetch(18, nil, true); one != 4<<20 || two != 0 {
			t.Errorf("the other is down: the liar sent %d, the other %d", one, two)
		}
		time.Sleep(distrust + time.Second)
		if one, _ := fetch(19, nil, false); one == 0 {
			t.Error("the liar is not asked first any more, long after")
		}
	})
}
