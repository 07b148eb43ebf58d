package main

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"
)

// tally counts what happened. It is safe for concurrent use.
type tally struct {
	mu     sync.Mutex
	done   int
	worst  time.Duration
	steps  map[string]*steps
	faults map[string]int // by step and message
}

type steps struct {
	n, failed   int
	worst       time.Duration // of those that succeeded
	worstFailed time.Duration
}

func (t *tally) cycles() int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.done
}

func (t *tally) cycle(took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.done++
	t.worst = max(t.worst, took)
}

// of returns the counts of a step. Called with mu held.
func (t *tally) of(what string) *steps {
	if t.steps == nil {
		t.steps, t.faults = map[string]*steps{}, map[string]int{}
	}
	if t.steps[what] == nil {
		t.steps[what] = &steps{}
	}
	return t.steps[what]
}

func (t *tally) step(what string, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.of(what)
	s.n++
	s.worst = max(s.worst, took)
}

// varies is what makes messages of one kind differ.
var varies = regexp.MustCompile(`"extract-[^"]+"|extract-\S+ sha256:\S+|sha256:[0-9a-f]+|/tmp/[^ ":]+|127\.0\.0\.1:\d+|\d+`)

func (t *tally) failed(what string, err error, took time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.of(what)
	s.failed++
	s.worstFailed = max(s.worstFailed, took)
	// Of a program's output the last line says why.
	lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
	message := varies.ReplaceAllString(lines[len(lines)-1], "*")
	t.faults[what+": ..."+message[max(0, len(message)-110):]]++
}

// print writes the summary.
func (t *tally) print() {
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Printf("%d cycles, the slowest %s\n", t.done, t.worst.Round(time.Millisecond))
	fmt.Printf("%-22s %6s %12s %8s %12s\n", "step", "done", "slowest", "failed", "slowest")
	for _, what := range slices.Sorted(maps.Keys(t.steps)) {
		s := t.steps[what]
		fmt.Printf("%-22s %6d %12s %8d %12s\n", what, s.n, s.worst.Round(time.Millisecond), s.failed, s.worstFailed.Round(time.Millisecond))
	}
	for _, message := range slices.Sorted(maps.Keys(t.faults)) {
		fmt.Printf("tried again, %d times: %s\n", t.faults[message], message)
	}
}
