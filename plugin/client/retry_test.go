package client

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestPatiently(t *testing.T) {
	t.Parallel()
	const url = "unexpected status from HEAD request to https://registry.example/v2/a/manifests/v1: "
	stopped := errors.New("stopped")
	for name, tc := range map[string]struct {
		answer string
		asked  int           // in all
		waited time.Duration // in all
		stop   time.Duration // when the context ends
	}{
		"busy":              {answer: url + "429 Too Many Requests", asked: 4, waited: 7 * time.Second},
		"broken":            {answer: "failed to resolve image: " + url + "500 Internal Server Error", asked: 4, waited: 7 * time.Second},
		"forbidden":         {answer: url + "403 Forbidden", asked: 1},
		"not built":         {answer: url + "501 Not Implemented", asked: 1},
		"a layer":           {answer: "unexpected status from GET request to https://registry.example/v2/a/blobs/sha256:ab: 500 Internal Server Error", asked: 1},
		"another text":      {answer: "not found: 429", asked: 1},
		"stopped meanwhile": {answer: url + "503 Service Unavailable", asked: 2, waited: 2 * time.Second, stop: 2 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				if tc.stop > 0 {
					defer time.AfterFunc(tc.stop, func() { cancel(stopped) }).Stop()
				}
				asked, began := 0, time.Now()
				err := patiently(ctx, func() error { asked++; return errors.New(tc.answer) })
				if waited := time.Since(began); asked != tc.asked || waited != tc.waited {
					t.Errorf("asked %d times in %s, want %d in %s", asked, waited, tc.asked, tc.waited)
				}
				if want := tc.answer; tc.stop == 0 && err.Error() != want || tc.stop > 0 && !errors.Is(err, stopped) {
					t.Errorf("got %v", err)
				}
			})
		})
	}
}
