package transfer

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"reflect"
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
	good = append(good, appendRecord(nil, 7, kindBlock, record{1, blockSize, 99})...)
	good = append(good, appendRecord(nil, 7, kindBlock, record{5, 1, 98})...)
	good = append(good, appendRecord(nil, 7, kindComplete, record{})...)
	f.Add(good)
	f.Add(good[:len(good)-3])
	f.Add(append(bytes.Clone(good), appendRecord(nil, 8, kindBlock, record{2, 1, 1})...))
	f.Add(append(bytes.Clone(good), make([]byte, 40)...))
	f.Add(stateHeader{size: maxBlobSize}.encode())
	f.Add([]byte(stateMagic))
	f.Add([]byte{})
	data := patternFile(f)
	f.Fuzz(func(t *testing.T, p []byte) { checkState(t, p, data) })
}

// FuzzStateRecords passes the checksums, which chance never does.
func FuzzStateRecords(f *testing.F) {
	data := patternFile(f)
	p := make([]byte, 3*blockSize)
	if _, err := data.ReadAt(p, 0); err != nil {
		f.Fatal(err)
	}
	raw := func(kind byte, block uint32, p []byte) []byte {
		return appendRecord(nil, 0, kind, record{block, uint32(len(p)), crc32.Checksum(p, castagnoli)})[:12]
	}
	good := append(raw(kindBlock, 0, p[:blockSize]), raw(kindBlock, 2, p[2*blockSize:2*blockSize+100])...)
	f.Add(int64(3*blockSize), uint32(1), good)
	f.Add(int64(2*blockSize+100), uint32(1), append(good, raw(kindComplete, 0, nil)...))
	f.Add(int64(2*blockSize+99), uint32(9), append(raw(kindBlock, 0, p[:blockSize-1]), good...))
	f.Add(int64(5), uint32(0), raw(kindBlock, 1<<31, p[:5]))
	f.Fuzz(func(t *testing.T, size int64, generation uint32, raw []byte) {
		p := stateHeader{size: size, generation: generation}.encode()
		for ; len(raw) >= 12; raw = raw[12:] {
			p = append(p, raw[:12]...)
			p = binary.LittleEndian.AppendUint32(p, recordCheck(generation, raw))
		}
		checkState(t, append(p, raw...), data)
	})
}

// patternFile is the data that the state files of the fuzz tests may be about.
func patternFile(f *testing.F) *os.File {
	f.Helper()
	p := make([]byte, 4*blockSize+1000)
	_, _ = rand.NewChaCha8([32]byte{}).Read(p)
	path := filepath.Join(f.TempDir(), dataName)
	if err := os.WriteFile(path, p, 0o600); err != nil {
		f.Fatal(err)
	}
	data, err := os.Open(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = data.Close() })
	return data
}

// checkState: what the parser accepts is within the blob, says the same when it is written again, and counts
// only where the data has the recorded checksum.
func checkState(t *testing.T, p []byte, data *os.File) {
	t.Helper()
	log, err := readState(bytes.NewReader(p))
	if err != nil {
		return
	}
	again := log.encode()
	for b, r := range log.blocks {
		if r.block != b || r.length == 0 || int64(b)*blockSize+int64(r.length) > log.size {
			t.Fatalf("block %+v of a blob of %d bytes", r, log.size)
		}
		again = append(again, appendRecord(nil, log.generation, kindBlock, r)...)
	}
	if log.complete {
		again = append(again, appendRecord(nil, log.generation, kindComplete, record{})...)
	}
	if log2, err := readState(bytes.NewReader(again)); err != nil || !reflect.DeepEqual(log, log2) {
		t.Fatalf("written again: %+v, %v, was %+v", log2, err, log)
	}
	if len(log.blocks) > len(p)/recordSize {
		t.Fatal("more blocks than records")
	}
	if log.size > 1<<30 {
		return
	}
	var have int64
	for _, r := range log.blocks {
		q := make([]byte, r.length)
		n, _ := data.ReadAt(q, int64(r.block)*blockSize)
		if n == len(q) && crc32.Checksum(q, castagnoli) == r.crc {
			have += int64(n)
		}
	}
	j := newJob("", Blob{Size: log.size}, Options{ConnectionsPerHost: 1}, &shared{})
	j.folder = &folder{log: log, data: data}
	checks, err := j.resume()
	if err != nil {
		t.Fatal(err)
	}
	if err := j.recheck(t.Context(), checks); err != nil {
		t.Fatal(err)
	}
	checkLedger(t, j.ledger, have)
}

func TestStateReadError(t *testing.T) {
	t.Parallel()
	if _, err := readState(io.MultiReader(bytes.NewReader(stateHeader{size: 1}.encode()), badReader{})); err == nil {
		t.Error("a read error was taken for the end")
	}
}

type badReader struct{}

func (badReader) Read([]byte) (int, error) { return 0, os.ErrInvalid }
