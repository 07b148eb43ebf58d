package transfer

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
)

// What a kill costs of a connection is less than a step, however the bytes come.
func TestEveryStepIsRecorded(t *testing.T) {
	t.Parallel()
	const size = 4 << 20
	data, b := randomBlob(62, size)
	for _, piece := range []int{1000, recordStep, 100_003, bufferSize, size} {
		for _, sent := range []int64{recordStep - 1, recordStep, blockSize + recordStep, 1<<20 + 77, 3<<20 - 1, size - 1} {
			t.Run(fmt.Sprintf("%d of pieces of %d", sent, piece), func(t *testing.T) {
				t.Parallel()
				m := newManager(t, t.TempDir(), Options{ChunkSize: size})
				src := &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
					return fakeReply{piece: piece, cut: sent, stall: true}, nil
				}}
				join(t, m, b, src)
				state, want := filepath.Join(filepath.Dir(dataPath(m, b)), stateName), sent/recordStep*recordStep
				var log *stateLog
				eventually(t, "the last whole step", func() bool {
					var err error
					if log, err = peekState(state); err != nil {
						return false
					}
					_, frontier := log.progress()
					return frontier >= want
				})
				f := &folder{path: filepath.Dir(state), blob: b, log: log}
				var err error
				if f.data, err = os.Open(dataPath(m, b)); err != nil {
					t.Fatal(err)
				}
				defer func() { _ = f.data.Close() }()
				got := int64(0)
				for _, r := range f.recorded() {
					got += int64(r.length)
					if ok, err := f.holds(r, make([]byte, blockSize)); !ok || err != nil {
						t.Errorf("block %d does not hold what its record says: %v", r.block, err)
					}
				}
				if got != want {
					t.Errorf("%d bytes are recorded of %d, want %d", got, sent, want)
				}
			})
		}
	}
}

// What comes faster than it is written takes one record a block.
func TestOneRecordForABlock(t *testing.T) {
	t.Parallel()
	const size = 8 << 20
	data, b := randomBlob(63, size)
	for piece, want := range map[int]int{bufferSize: size / blockSize, recordStep: size / recordStep} {
		t.Run(fmt.Sprint(piece), func(t *testing.T) {
			t.Parallel()
			m := newManager(t, t.TempDir(), Options{})
			h := join(t, m, b, &fakeSource{host: "a", data: data, reply: func(context.Context, int, int64, int64) (fakeReply, error) {
				return fakeReply{piece: piece}, nil
			}})
			got, err := readAll(t, h)
			if err != nil || !bytes.Equal(got, data) {
				t.Fatalf("read %d bytes, %v", len(got), err)
			}
			wait(t, h)
			st, err := os.Stat(filepath.Join(filepath.Dir(dataPath(m, b)), stateName))
			if err != nil {
				t.Fatal(err)
			}
			if n := int(st.Size()-headerSize)/recordSize - 1; n != want { // one says that it is complete
				t.Errorf("%d records, want %d", n, want)
			}
		})
	}
}

// Bytes that a connection is about to write are not given to another one.
func TestHeldIsNotTakenOver(t *testing.T) {
	t.Parallel()
	const size = 64 << 20
	hosts := NewHosts(HostLimits{})
	j := newJob("", Blob{Digest: digest.FromString("x"), Size: size}, Options{}, &shared{hosts: hosts})
	j.addSources([]Source{&fakeSource{host: "slow"}, &fakeSource{host: "fast"}})
	now := time.Now()
	hosts.brought(j.hosts["fast"].shared, 100<<20, time.Second)
	s := j.ledger.claim(size, size)
	begun := now.Add(-5 * time.Second)
	c := &conn{src: j.sources[0], span: s, begun: begun, last: now, got: 1, mark: begun, pace: 1, cancel: func(error) {}}
	j.conns[c] = struct{}{}
	if n := j.reserve(s, 2*blockSize+1); n != 2*blockSize+1 {
		t.Fatalf("%d bytes reserved", n)
	}
	if !j.overtake() {
		t.Fatal("a connection that crawls keeps everything")
	}
	if s.end != 3*blockSize {
		t.Errorf("it keeps %d bytes, want the %d it writes and the rest of their last block", s.end, 2*blockSize+1)
	}
	if n := j.reserve(s, size); n != 3*blockSize {
		t.Errorf("it may write %d bytes, want %d", n, 3*blockSize)
	}
	j.ledger.release(s)
	if n := j.reserve(s, size); n != 0 {
		t.Errorf("it may write %d bytes of what it lost", n)
	}
}
