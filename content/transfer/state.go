package transfer

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
)

// The state file, little endian. A header of 64 bytes:
//
//	0  8  magic "gantryTX"
//	8  4  version, 1
//	12 4  block size in bytes
//	16 8  size of the blob in bytes
//	24 32 SHA-256 that names the blob
//	56 4  generation: a random number, new whenever the data starts again from nothing
//	60 4  CRC-32C of the 60 bytes before
//
// followed by records of 16 bytes, appended one by one:
//
//	0  4  block number
//	4  4  kind in the top byte, length in bytes below: the first length bytes of the block are there
//	8  4  CRC-32C of these bytes
//	12 4  CRC-32C over the generation and the 12 bytes before
//
// A record that does not match its own checksum is no record; whatever follows may be one. A later record of a
// block replaces an earlier one. A reader needs no lock: it may follow the file while its owner appends.
const (
	stateMagic   = "gantryTX"
	stateVersion = 1
	headerSize   = 64
	recordSize   = 16
	maxBlobSize  = int64(1) << 50 // what 32 bits of block number can name

	kindBlock    = 1
	kindComplete = 2
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

var errStateHeader = errors.New("no valid header")

type stateHeader struct {
	size       int64
	sum        [32]byte
	generation uint32
}

type record struct {
	block  uint32
	length uint32
	crc    uint32
}

// blob is what the data is to become.
func (h stateHeader) blob() Blob {
	return Blob{Digest: digest.NewDigestFromBytes(digest.SHA256, h.sum[:]), Size: h.size}
}

func (h stateHeader) encode() []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, stateMagic...)
	b = binary.LittleEndian.AppendUint32(b, stateVersion)
	b = binary.LittleEndian.AppendUint32(b, blockSize)
	b = binary.LittleEndian.AppendUint64(b, uint64(h.size))
	b = append(b, h.sum[:]...)
	b = binary.LittleEndian.AppendUint32(b, h.generation)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b, castagnoli))
}

func decodeHeader(b []byte) (stateHeader, error) {
	var h stateHeader
	le := binary.LittleEndian
	if len(b) < headerSize || !bytes.HasPrefix(b, []byte(stateMagic)) ||
		le.Uint32(b[60:]) != crc32.Checksum(b[:60], castagnoli) ||
		le.Uint32(b[8:]) != stateVersion || le.Uint32(b[12:]) != blockSize {
		return h, errStateHeader
	}
	h.size = int64(le.Uint64(b[16:]))
	if h.size < 0 || h.size > maxBlobSize {
		return h, errStateHeader
	}
	copy(h.sum[:], b[24:])
	h.generation = le.Uint32(b[56:])
	return h, nil
}

func appendRecord(b []byte, generation uint32, kind byte, r record) []byte {
	start := len(b)
	b = binary.LittleEndian.AppendUint32(b, r.block)
	b = binary.LittleEndian.AppendUint32(b, uint32(kind)<<24|r.length)
	b = binary.LittleEndian.AppendUint32(b, r.crc)
	return binary.LittleEndian.AppendUint32(b, recordCheck(generation, b[start:]))
}

func recordCheck(generation uint32, b []byte) uint32 {
	var g [4]byte
	binary.LittleEndian.PutUint32(g[:], generation)
	return crc32.Update(crc32.Checksum(g[:], castagnoli), castagnoli, b[:12])
}

// stateLog is what a state file says.
type stateLog struct {
	stateHeader
	blocks   map[uint32]record
	complete bool
}

// readState parses a state file. Only a header that is not valid is an error; bad records are left out.
func readState(r io.Reader) (*stateLog, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	var hb [headerSize]byte
	if _, err := io.ReadFull(br, hb[:]); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, errStateHeader
		}
		return nil, err
	}
	h, err := decodeHeader(hb[:])
	if err != nil {
		return nil, err
	}
	log := &stateLog{stateHeader: h, blocks: map[uint32]record{}}
	if err := h.scan(br, log.add); err != nil {
		return nil, err
	}
	return log, nil
}

// scan hands out the records that follow a header, 16 bytes each, valid or not.
func (h stateHeader) scan(r io.Reader, each func(b []byte)) error {
	for {
		var b [recordSize]byte
		if _, err := io.ReadFull(r, b[:]); err != nil {
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil
			}
			return err
		}
		each(b[:])
	}
}

func (s *stateLog) add(b []byte) {
	switch kind, r := s.decode(b); kind {
	case kindComplete:
		s.complete = true
	case kindBlock:
		s.blocks[r.block] = r
	}
}

// decode reads one record; kind 0 if it is none.
func (h stateHeader) decode(b []byte) (kind uint32, r record) {
	le := binary.LittleEndian
	if le.Uint32(b[12:]) != recordCheck(h.generation, b) {
		return 0, r
	}
	kind = le.Uint32(b[4:]) >> 24
	r = record{block: le.Uint32(b), length: le.Uint32(b[4:]) & (1<<24 - 1), crc: le.Uint32(b[8:])}
	if kind == kindBlock && (r.length == 0 || int64(r.length) > blockLen(h.size, r.block)) {
		return 0, r
	}
	return kind, r
}

// blockLen is the length of a block of a blob of that size; 0 or less if there is no such block.
func blockLen(size int64, block uint32) int64 {
	return min(blockSize, size-int64(block)*blockSize)
}

// stateFile appends records. Safe for concurrent use: records that belong together are one write to a file opened with
// O_APPEND.
type stateFile struct {
	f          *os.File
	generation uint32
}

// createState starts an empty state file at path, replacing what is there.
func createState(path string, size int64, sum [32]byte) (_ *stateFile, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_RDWR|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	h := stateHeader{size: size, sum: sum, generation: rand.Uint32()}
	if _, err := f.Write(h.encode()); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &stateFile{f: f, generation: h.generation}, nil
}

// openState opens a state file for appending, after a record that was cut short.
func openState(path string) (*stateFile, *stateLog, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return nil, nil, err
	}
	log, err := readState(f)
	if err == nil {
		err = trimRecord(f)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("state %s: %w", path, err), f.Close())
	}
	return &stateFile{f: f, generation: log.generation}, log, nil
}

func trimRecord(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if extra := (st.Size() - headerSize) % recordSize; extra > 0 {
		return f.Truncate(st.Size() - extra)
	}
	return nil
}

func (s *stateFile) append(kind byte, recs ...record) error {
	if len(recs) == 0 {
		return nil
	}
	b := make([]byte, 0, len(recs)*recordSize)
	for _, r := range recs {
		b = appendRecord(b, s.generation, kind, r)
	}
	n, err := s.f.Write(b)
	if err != nil && n > 0 {
		// Records are found by their offset: a piece of one must not shift those that follow.
		err = errors.Join(err, trimRecord(s.f))
	}
	return err
}

func (s *stateFile) Close() error { return s.f.Close() }

// peekComplete looks, without a lock, whether a folder claims to hold a finished blob: then that is its last record.
func peekComplete(root, name string, b Blob) bool {
	f, err := os.Open(filepath.Join(root, name, stateName))
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	h, err := peekHeader(f)
	if err != nil || h.blob() != b {
		return false
	}
	st, err := f.Stat()
	if err != nil {
		return false
	}
	var rec [recordSize]byte
	last := (st.Size()-headerSize)/recordSize - 1
	if _, err := f.ReadAt(rec[:], headerSize+last*recordSize); last < 0 || err != nil {
		return false
	}
	kind, _ := h.decode(rec[:])
	return kind == kindComplete
}

// progress counts the bytes that are said to be there, and those of them without a gap from the start.
func (s *stateLog) progress() (received, frontier int64) {
	if s.complete {
		return s.size, s.size
	}
	for _, r := range s.blocks {
		received += int64(r.length)
	}
	for n := uint32(0); frontier == int64(n)*blockSize; n++ {
		frontier += int64(s.blocks[n].length)
		if s.blocks[n].length == 0 {
			break
		}
	}
	return received, frontier
}

// peekState reads a state file that somebody else may be writing.
func peekState(path string) (*stateLog, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	log, err := readState(f)
	return log, errors.Join(err, f.Close())
}

// peekSize reads only the size in a state file's header.
func peekSize(path string) (int64, bool) {
	f, err := os.Open(path)
	if err != nil {
		return 0, false
	}
	defer func() { _ = f.Close() }()
	h, err := peekHeader(f)
	return h.size, err == nil
}

func peekHeader(f *os.File) (stateHeader, error) {
	var b [headerSize]byte
	if _, err := f.ReadAt(b[:], 0); err != nil {
		return stateHeader{}, err
	}
	return decodeHeader(b[:])
}
