package content

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/sirupsen/logrus"
)

// records are the log lines of one test.
type records struct {
	mu    sync.Mutex
	lines []string
}

func (*records) Levels() []logrus.Level { return logrus.AllLevels }

func (r *records) Fire(e *logrus.Entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lines = append(r.lines, fmt.Sprintf("%s %s %v %v %v", e.Level, e.Message, e.Data["digest"], e.Data["ref"], e.Data["error"]))
	return nil
}

// One line says what happened, whoever waits.
func TestOneWarning(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		data, d := randomBytes(t, 5000)
		r := &records{}
		logger := logrus.New()
		logger.SetOutput(io.Discard)
		logger.SetLevel(logrus.DebugLevel)
		logger.AddHook(r)
		tr := newTransfer(t, data)
		s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{transfer: tr}})
		var wg sync.WaitGroup
		for i := range 5 {
			wg.Go(func() {
				ctx := log.WithLogger(namespaces.WithNamespace(t.Context(), "ns"), logrus.NewEntry(logger))
				w, err := s.Open(ctx, fmt.Sprintf("ns/%d/layer-%s", i, d), 5000, "")
				if err != nil {
					t.Error(err)
					return
				}
				_, err = w.Status(ctx)
				if n := w.Stat().Offset; err == nil && n < 5000 {
					time.Sleep(time.Second) // until the others follow
					_, err = w.Write(ctx, 0, data[n:])
				}
				if err := errors.Join(err, w.Close()); err != nil {
					t.Error(err)
				}
			})
		}
		synctest.Wait()
		tr.fail(3000)
		wg.Wait()
		var warnings []string
		followed := 0
		for _, l := range r.lines {
			switch {
			case !strings.HasPrefix(l, "debug "):
				warnings = append(warnings, l)
			case strings.Contains(l, "this one waits for it "+d.String()):
				followed++
			}
		}
		if len(warnings) != 1 || followed != 4 {
			t.Fatalf("warnings %q and %d followers, wanted one and four", warnings, followed)
		}
		for _, want := range []string{"warning the transfer failed, the client goes on", d.String(), "ns/", "registry.test: unavailable"} {
			if !strings.Contains(warnings[0], want) {
				t.Errorf("%q does not say %q", warnings[0], want)
			}
		}
	})
}

// Everything at once: clients that leave, are aborted, begin anew, write the wrong
// thing or are too slow. Whoever gets through gets the right blob, and nothing is left.
func TestManyLeaders(t *testing.T) {
	t.Parallel()
	data, d := randomBytes(t, 20000)
	bad := slices.Clone(data)
	bad[7] ^= 1
	s := newStore(t, t.TempDir(), Options{Fetcher: &fakeFetcher{}, GiveUp: time.Millisecond})
	var wg sync.WaitGroup
	var through atomic.Int64
	for i := range 8 {
		wg.Go(func() {
			for turn := range 40 {
				c := newClient(fmt.Sprint("ns", i), data, d)
				if (i+turn)%5 == 0 {
					c.data = bad
				}
				if chaos(t, s, c, (3*i+turn)%7) {
					through.Add(1)
				}
			}
		})
	}
	wg.Wait()
	for ref := range s.ingests {
		if err := s.Abort(t.Context(), ref); err != nil {
			t.Error(err)
		}
	}
	if through.Load() == 0 {
		t.Error("nobody got through")
	}
	_, err := s.Info(t.Context(), d)
	wantBlob(t, s, data, err == nil)
	wantNothingLeft(t, s)
}

// chaos is one pull that goes wrong in one of several ways, or does not.
func chaos(t *testing.T, s *Store, c *client, way int) bool {
	t.Helper()
	ctx := c.context(t.Context())
	var err error
	if c.session, err = s.Open(ctx, c.ref(), int64(len(c.data)), ""); err != nil {
		t.Errorf("open: %v", err)
		return false
	}
	defer func() { _ = c.session.Close() }()
	c.base = c.session.Stat().Offset
	if _, err := c.session.Status(ctx); err != nil {
		t.Errorf("status: %v", err)
		return false
	}
	for i := 0; c.session.Stat().Offset < int64(len(c.data)); i++ {
		err := c.write(ctx, 3000)
		switch {
		case i == 2 && way == 1:
			return false
		case i == 2 && way == 2:
			_ = s.Abort(ctx, c.ref())
		case i == 2 && way == 3:
			runtime.Gosched()
		case i == 2 && way == 4:
			_ = s.Delete(ctx, c.d)
		}
		if err != nil {
			return false
		}
	}
	_, err = c.session.Commit(ctx, c.session.Stat().Offset-c.session.shift, int64(len(c.data)), c.d, nil)
	if err == nil || errdefs.IsAlreadyExists(err) {
		_ = s.Delete(ctx, c.d) // for the others to have something to do
		return true
	}
	if !errdefs.IsAborted(err) && !errdefs.IsFailedPrecondition(err) {
		t.Errorf("commit: %v", err)
	}
	return false
}
