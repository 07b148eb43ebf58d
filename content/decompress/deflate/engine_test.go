package deflate

import (
	"bytes"
	"errors"
	"testing"
)

// newTestEngine has a chunk that is verified and one behind it that is not, each with its segment.
func newTestEngine(t *testing.T) (e *engine, head, guess *chunk) {
	t.Helper()
	e = newEngine(source{at: bytes.NewReader(make([]byte, 5*3000))}, []Option{WithWorkers(2), withSizes(3000, smallSlab, 4)})
	head = e.front
	head.seg.load()
	head.stage = running
	j, guess := e.lengthen()
	if j != decodeIt || guess == nil || guess != head.next {
		t.Fatalf("%d, %p: no guess was made", j, guess)
	}
	guess.stage = running
	return e, head, guess
}

// TestClaimLeavesGuesses: whoever reads the source without segments has none of which a guess begins in, nor may one go on
// there.
func TestClaimLeavesGuesses(t *testing.T) {
	t.Parallel()
	e, head, guess := newTestEngine(t)
	e.copying = true
	if e.claim(head, guess.seg) {
		t.Error("the source was claimed behind a guess's segment")
	}
	e.absorb(head, guess)
	if !e.claim(head, guess.seg) {
		t.Error("the source was not claimed, though no guess is left")
	}
	if _, err := e.overflow(guess, guess.seg); !errors.Is(err, errNotYet) {
		t.Errorf("a dead guess goes on behind the claim: %v, want errNotYet", err)
	}
}

// TestGuessKeepsWhatItNeedsToRestart: a guess is verified while it runs, goes on, and fails as a guess: it begins again, and must
// still have its segments then.
func TestGuessKeepsWhatItNeedsToRestart(t *testing.T) {
	t.Parallel()
	e, _, guess := newTestEngine(t)
	second, err := e.overflow(guess, guess.seg)
	if err != nil {
		t.Fatal(err)
	}
	guess.verify(new(window))
	if _, err := e.overflow(guess, second); !errors.Is(err, errNotYet) {
		t.Errorf("it went on before its decoder knew: %v, want errNotYet", err)
	}
	guess.sure = true
	if _, err := e.overflow(guess, second); err != nil {
		t.Errorf("then it did not: %v", err)
	}
}

// TestNoGuessesInPadding: what drain has read is gone.
func TestNoGuessesInPadding(t *testing.T) {
	t.Parallel()
	e, head, guess := newTestEngine(t)
	if err := e.drain(head.seg); err != nil {
		t.Fatal(err)
	}
	if guess.seg.refs != 1 {
		t.Errorf("the guess's segment has %d references, want the guess's own", guess.seg.refs)
	}
	if j, c := e.lengthen(); c != nil {
		t.Errorf("%d, chunk at %d: a guess was made", j, c.lo)
	}
}
