package transfer

import (
	"bytes"
	"crypto/sha256"
	"io"
	"os"
	"path/filepath"
	"testing"
)

func TestStateFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), stateName)
	sum := sha256.Sum256([]byte("x"))
	s, err := createState(path, 3*blockSize+10, sum)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range []record{{0, blockSize, 1}, {2, 17, 2}, {2, blockSize, 3}, {3, 10, 4}, {3, 11, 5}, {4, 1, 6}} {
		if err := s.append(kindBlock, r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	_, log, err := reopenState(path)
	want := map[uint32]record{0: {0, blockSize, 1}, 2: {2, blockSize, 3}, 3: {3, 10, 4}}
	if err != nil || log.sum != sum || log.complete || len(log.blocks) != len(want) {
		t.Fatalf("got %+v, want %+v", log, want)
	}
	for b, r := range want {
		if log.blocks[b] != r {
			t.Errorf("block %d: %+v, want %+v", b, log.blocks[b], r)
		}
	}
	// Appending goes on after a record that was cut short.
	if err := os.Truncate(path, headerSize+5*recordSize+7); err != nil {
		t.Fatal(err)
	}
	s, _, err = openState(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.append(kindComplete, record{}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, log, err := reopenState(path); err != nil || !log.complete || !peekComplete(filepath.Dir(path), "", log.blob()) {
		t.Error("a record after a torn one is lost")
	}
}

func reopenState(path string) (*stateFile, *stateLog, error) {
	s, log, err := openState(path)
	if err == nil {
		err = s.Close()
	}
	return s, log, err
}

// FuzzState wants the parser to take anything, and what it accepts to be within the blob.
func FuzzState(f *testing.F) {
	h := stateHeader{size: 5*blockSize + 1, generation: 7}
	good := h.encode()
	good = append(good, encodeRecord(7, kindBlock, record{1, blockSize, 99})...)
	good = append(good, encodeRecord(7, kindBlock, record{5, 1, 98})...)
	good = append(good, encodeRecord(7, kindComplete, record{})...)
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add(append(bytes.Clone(good), encodeRecord(8, kindBlock, record{2, 1, 1})...))
	f.Add(append(bytes.Clone(good), make([]byte, 40)...))
	f.Add(stateHeader{size: maxBlobSize}.encode())
	f.Add([]byte(stateMagic))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		log, err := readState(bytes.NewReader(p))
		if err != nil {
			return
		}
		for b, r := range log.blocks {
			if r.block != b || r.length == 0 || int64(b)*blockSize+int64(r.length) > log.size {
				t.Fatalf("block %+v of a blob of %d bytes", r, log.size)
			}
		}
		if len(log.blocks) > len(p)/recordSize {
			t.Fatal("more blocks than records")
		}
		// The ledger must take what the parser accepts, whatever the data file holds.
		if log.size > 1<<30 {
			return
		}
		data, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = data.Close() }()
		j := newJob("", Blob{Size: log.size}, Options{ConnectionsPerHost: 1}, &shared{})
		j.folder = &folder{log: log, data: data}
		checks, err := j.resume()
		if err != nil {
			t.Fatal(err)
		}
		if err := j.recheck(t.Context(), checks); err != nil {
			t.Fatal(err)
		}
		checkLedger(t, j.ledger, 0)
	})
}

func TestStateReadError(t *testing.T) {
	t.Parallel()
	if _, err := readState(io.MultiReader(bytes.NewReader(stateHeader{size: 1}.encode()), badReader{})); err == nil {
		t.Error("a read error was taken for the end")
	}
}

type badReader struct{}

func (badReader) Read([]byte) (int, error) { return 0, os.ErrInvalid }
