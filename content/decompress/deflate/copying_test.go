package deflate

import (
	"bytes"
	"io"
	"sync/atomic"
	"testing"
)

// guesses decodes in and returns how many chunks were begun ahead of the chain, and
// whether they are left out at the end.
func guesses(t *testing.T, in, want []byte, chunk int, opts ...Option) (n int, none bool) {
	t.Helper()
	r, err := NewReaderAt(bytes.NewReader(in), append(opts, WithWorkers(2), withSizes(chunk, 4*smallSlab, 4))...)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(r)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d bytes, %v; want %d", len(got), err, len(want))
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return r.e.counts.right + r.e.counts.wrong, r.e.copying
}

// TestNoGuessesAtStored: what is only copied is left to one worker, and the others
// come back when there is something to decode.
func TestNoGuessesAtStored(t *testing.T) {
	t.Parallel()
	stored, coded := noise(3_000_000, false), prose(3_000_000)
	a, b := squeezeGzip(t, stored, 0), squeezeGzip(t, coded, 6)
	if n, none := guesses(t, a, stored, 150_000); n > 4 || !none { // of 20 chunks
		t.Errorf("%d guesses at stored blocks, left out at the end: %v", n, none)
	}
	if n, none := guesses(t, join(a, b), join(stored, coded), 20_000); none {
		t.Errorf("%d guesses, and none at the end, where coded blocks follow", n)
	}
}

// TestNoGuessesOnBusyProcessors: guesses cost more than they bring where no processor is spare, and begin when one is.
func TestNoGuessesOnBusyProcessors(t *testing.T) {
	t.Parallel()
	want := prose(3_000_000)
	in := squeezeGzip(t, want, 6)
	if n, _ := guesses(t, in, want, 20_000, WithSpare(func() bool { return false })); n > 0 {
		t.Errorf("%d guesses without a spare processor", n)
	}
	var asked atomic.Int32
	spare := func() bool { return asked.Add(1) > 5 }
	for round := 0; ; round++ { // a worker that comes late is not asked for
		if n, _ := guesses(t, in, want, 20_000, WithSpare(spare)); n > 0 {
			break
		} else if round == 1000 {
			t.Fatalf("no guesses, though a processor is spare from the 6th of %d times on", asked.Load())
		}
	}
}
