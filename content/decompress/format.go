package decompress

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Format is how a blob is compressed.
type Format string

// The formats that are told apart. Uncompressed is also everything unknown.
const (
	Gzip         Format = "gzip"         // RFC 1952
	Zstd         Format = "zstd"         // RFC 8878
	LZ4          Format = "lz4"          // LZ4 frame format 1.6, and its legacy format
	AppleLZ4     Format = "apple-lz4"    // what Apple's Compression framework writes
	Uncompressed Format = "uncompressed" // a tar, or anything else
)

const (
	magicZstd      = 0xFD2FB528
	magicLZ4       = 0x184D2204
	magicLZ4Legacy = 0x184C2102
	magicSkip      = 0x184D2A50 // the lowest of 16; zstd and LZ4 share them
	magicSkipMask  = 0xFFFFFFF0
)

// How a block begins in Apple's framing.
const (
	appleBlock  = "bv41"
	appleStored = "bv4-"
	appleEnd    = "bv4$"
)

// sniff names the format of what br holds. Skippable frames in front of the
// first real one belong to zstd and LZ4 alike, so they are read away to see
// which it is; a stream of nothing else is empty in both.
func sniff(br *bufio.Reader) (Format, error) {
	skipped := false
	for {
		head, err := br.Peek(8)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		format, skip := identify(head)
		switch {
		case skip && len(head) < 8:
			return "", fmt.Errorf("skippable frame without its length: %w: %w", ErrCorrupt, io.ErrUnexpectedEOF)
		case skip:
			if err := skipFrame(br, head); err != nil {
				return "", err
			}
			skipped = true
		case skipped && len(head) == 0:
			return Zstd, nil
		case skipped && len(head) < 4:
			return "", fmt.Errorf("stream ends within the magic of a frame: %w: %w", ErrCorrupt, io.ErrUnexpectedEOF)
		case skipped && format != Zstd && format != LZ4:
			return "", fmt.Errorf("skippable frame before something that is neither zstd nor lz4: %w", ErrCorrupt)
		case format == AppleLZ4 && isTar(br):
			return Uncompressed, nil
		default:
			return format, nil
		}
	}
}

// isTar looks for the magic of a POSIX or GNU tar: a tar begins with a file's
// name, which may be any text.
func isTar(br *bufio.Reader) bool {
	const at, magic = 257, "ustar"
	head, _ := br.Peek(at + len(magic))
	return len(head) == at+len(magic) && string(head[at:]) == magic
}

// skipFrame reads away a skippable frame whose first 8 bytes are head.
func skipFrame(br *bufio.Reader, head []byte) error {
	want := 8 + int64(binary.LittleEndian.Uint32(head[4:]))
	n, err := io.CopyN(io.Discard, br, want)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("skippable frame of %d bytes ends after %d: %w: %w", want, n, ErrCorrupt, io.ErrUnexpectedEOF)
	}
	return err
}

// identify looks at up to 8 bytes; skip is true for a skippable frame.
func identify(head []byte) (format Format, skip bool) {
	if isGzip(head) && len(head) > 2 && head[2] == 8 {
		return Gzip, false
	}
	if len(head) < 4 {
		return Uncompressed, false
	}
	switch string(head[:4]) {
	case appleBlock, appleStored, appleEnd:
		return AppleLZ4, false
	}
	switch m := binary.LittleEndian.Uint32(head); {
	case m == magicZstd:
		return Zstd, false
	case m == magicLZ4, m == magicLZ4Legacy:
		return LZ4, false
	case m&magicSkipMask == magicSkip:
		return "", true
	}
	return Uncompressed, false
}

// isGzip looks at the two bytes by which gzip(1) knows a member.
func isGzip(head []byte) bool {
	return len(head) >= 2 && head[0] == 0x1f && head[1] == 0x8b
}
