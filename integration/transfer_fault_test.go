package integration

import (
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/integration/harness"
)

// TestFlippedByte changes one byte of a layer on its way. It is never stored as
// good, and who sent it is named; whether the pull succeeds depends on who has good bytes.
func TestFlippedByte(t *testing.T) {
	const at = 20 << 20
	t.Run("once on the only host", func(t *testing.T) {
		im := random(t, 10, 40)
		f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
		var flipped atomic.Bool
		f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault {
			return &harness.Fault{Corrupt: func(p []byte, off int64) {
				if at >= off && at < off+int64(len(p)) && flipped.CompareAndSwap(false, true) {
					harness.Flip(at)(p, off)
				}
			}}
		}))
		mustPull(t, n, "default", ref)
		if !flipped.Load() {
			t.Error("no byte was flipped")
		}
		checkWhole(t, n, "default", ref, im)
		checkFetcher(t, f, im)
		checkLog(t, n, im.Layers[0].Digest.String(), f.Host(), "level=warn")
		checkSent(t, f, im, 3) // the blob, once more, and the blocks that differ
	})
	t.Run("always on the mirror", func(t *testing.T) {
		mirror, server := newFaultRegistry(t, harness.FaultOptions{}), newFaultRegistry(t, harness.FaultOptions{})
		n := newFaultyNode(t, harness.Options{})
		if err := n.AddRegistry("http", server.Host(), mirror.Host()); err != nil {
			t.Fatal(err)
		}
		im := random(t, 11, 40)
		mirror.AddImage(im, "mirrored", "test")
		ref := server.AddImage(im, "mirrored", "test")
		mirror.SetRule(flipAlways(im.Layers[0].Digest, at))
		mustPull(t, n, "default", ref)
		checkWhole(t, n, "default", ref, im)
		if mirror.SentBlob(im.Layers[0].Digest) == 0 || server.SentTo("containerd") >= im.Size() {
			t.Errorf("the mirror sent %d bytes, and the server %d to containerd", mirror.SentBlob(im.Layers[0].Digest), server.SentTo("containerd"))
		}
		checkLog(t, n, im.Layers[0].Digest.String(), mirror.Host(), "level=warn")
		t.Logf("of %d bytes the mirror sent %d, the server %d", im.Size(), mirror.SentTo(harness.Gantry), server.SentTo(harness.Gantry))
	})
	t.Run("always on the only host", func(t *testing.T) {
		im := random(t, 12, 40)
		f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
		f.SetRule(flipAlways(im.Layers[0].Digest, at))
		_, err := n.Pull(t.Context(), "default", ref)
		if err == nil {
			t.Fatal("the pull succeeded")
		}
		message := says(err.Error())
		t.Logf("says: %s", message)
		checkMessage(t, err.Error(), ref, im.Layers[0], im.DiffIDs[0])
		if rest := strings.ReplaceAll(message, ref, ""); !strings.Contains(rest, f.Host()) {
			t.Errorf("the message does not name the host %s beside the image: %s", f.Host(), message)
		}
		if n.Complete(t.Context(), "default", ref) == nil {
			t.Error("the image is complete")
		}
		checkLog(t, n, im.Layers[0].Digest.String(), f.Host(), "level=warn")
		f.SetRule(nil)
		mustPull(t, n, "default", ref)
		checkWhole(t, n, "default", ref, im)
	})
}

// flipAlways is a host that has one wrong byte of a blob.
func flipAlways(dgst digest.Digest, at int64) harness.Rule {
	return func(r *http.Request) *harness.Fault {
		if !isOf(r, dgst) {
			return nil
		}
		return &harness.Fault{Corrupt: harness.Flip(at)}
	}
}

// TestStalledConnection lets one connection send nothing more after 300 kB: it is given up within 15 s, and only
// what belongs to its chunk can be sent twice.
func TestStalledConnection(t *testing.T) {
	im := random(t, 13, 100)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	var seen atomic.Int64
	f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault {
		if seen.Add(1) == 3 {
			return &harness.Fault{StallAfter: 300_000}
		}
		return nil
	}))
	mustPull(t, n, "default", ref)
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	requests := requestsOf(f.Requests(), im.Layers[0].Digest)
	i := slices.IndexFunc(requests, func(r *harness.Request) bool { return r.Bytes() == 300_000 && asked(r) > r.Bytes() })
	if i < 0 {
		t.Fatal("no connection stalled")
	}
	stalled := requests[i]
	until(t, nil, func() bool { return !stalled.Ended().IsZero() })
	t.Logf("given up after %s, asked for %d bytes", stalled.Ended().Sub(stalled.Time).Round(time.Millisecond), asked(stalled))
	// A second more: for the bytes before the stall, and for the registry to see the connection end.
	if took := stalled.Ended().Sub(stalled.Time); took > 16*time.Second {
		t.Errorf("the stalled connection was given up after %s, want 15 s", took)
	}
	if extra := f.SentBlob(im.Layers[0].Digest) - im.Layers[0].Size; extra > asked(stalled) {
		t.Errorf("%d bytes were sent twice, want at most the chunk's %d", extra, asked(stalled))
	}
	checkSent(t, f, im, 1+float64(asked(stalled)+(1<<20))/float64(all(im)))
}

// requestsOf are gantry's requests for a blob.
func requestsOf(requests []*harness.Request, dgst digest.Digest) []*harness.Request {
	return slices.DeleteFunc(requests, func(r *harness.Request) bool {
		got, ok := r.Blob()
		return !ok || got != dgst || r.Client() != harness.Gantry
	})
}

// TestRangeIgnored has a host that always sends the whole blob: it is read once, by one stream.
func TestRangeIgnored(t *testing.T) {
	im := random(t, 14, 60, 40)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault { return &harness.Fault{IgnoreRange: true} }))
	mustPull(t, n, "default", ref)
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	for i, l := range im.Layers {
		var streams int
		for _, r := range requestsOf(f.Requests(), l.Digest) {
			if r.Bytes() == l.Size {
				streams++
			}
			t.Logf("layer %d: status %d, %d bytes", i, r.Status(), r.Bytes())
		}
		if streams != 1 {
			t.Errorf("layer %d was sent whole %d times, want once", i, streams)
		}
	}
	// What other requests were sent before they were given up is what fits into the buffers.
	checkSent(t, f, im, 1.10)
}

// TestWrongRange has hosts that send another part than was asked for, and say so, always or now and then: no byte of
// it is stored, and gantry reads the blob as one plain stream.
func TestWrongRange(t *testing.T) {
	for name, every := range map[string]int64{"always": 1, "one in three": 3} {
		t.Run(name, func(t *testing.T) {
			im := random(t, 15, 40)
			f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
			var seen atomic.Int64
			f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault {
				if seen.Add(1)%every == 0 {
					return &harness.Fault{WrongRange: 4096}
				}
				return nil
			}))
			mustPull(t, n, "default", ref)
			checkWhole(t, n, "default", ref, im)
			t.Logf("sent: %v", f.BlobBytes()[im.Layers[0].Digest])
			checkLog(t, n, im.Layers[0].Digest.String(), f.Host(), "level=warn")
			checkFetcher(t, f, im)
			checkSent(t, f, im, 1.6) // what came before the first mistake, and the whole
		})
	}
}

// TestShortReplies has a host that answers every other request with half of what was asked for: nothing is lost.
func TestShortReplies(t *testing.T) {
	im := random(t, 16, 60)
	f, n, ref := faulty(t, im, harness.FaultOptions{}, harness.Options{})
	var seen atomic.Int64
	f.SetRule(layersOnly(im, func(*http.Request) *harness.Fault { return &harness.Fault{Short206: seen.Add(1)%2 == 0} }))
	mustPull(t, n, "default", ref)
	checkWhole(t, n, "default", ref, im)
	checkFetcher(t, f, im)
	checkSent(t, f, im, 1.01)
}
