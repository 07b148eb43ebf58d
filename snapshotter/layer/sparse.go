package layer

import (
	"archive/tar"
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/gantryd/gantry/snapshotter/erofs"
)

// sparseVersion says which of GNU's PAX sparse formats a member has: "" (none),
// "0" (0.0 and 0.1, the map is in the records) or "1" (1.0, the map precedes the
// data). See "Storing Sparse Files" in GNU tar's manual. A version that is
// neither makes it a plain member, as archive/tar has it.
func sparseVersion(hdr *tar.Header) string {
	major, minor := hdr.PAXRecords["GNU.sparse.major"], hdr.PAXRecords["GNU.sparse.minor"]
	switch {
	case major == "0" && (minor == "0" || minor == "1"):
		return "0"
	case major == "1" && minor == "0":
		return "1"
	case major == "" && minor == "" && hdr.PAXRecords["GNU.sparse.map"] != "":
		return "0"
	}
	return ""
}

// physicalSize is the number of bytes that a sparse member takes in the tar;
// archive/tar only tells the size of the file that it describes.
func physicalSize(hdr *tar.Header, t *tape) (int64, error) {
	record := hdr.PAXRecords["size"]
	if record == "" {
		return t.rawSize(), nil
	}
	return strconv.ParseInt(record, 10, 64)
}

// sparseExtents maps the data of a sparse member, which begins at data and is
// size bytes long. archive/tar has validated the map's order and bounds.
func sparseExtents(version string, hdr *tar.Header, t *tape, data, size int64) ([]erofs.Extent, error) {
	numbers := hdr.PAXRecords["GNU.sparse.map"]
	sep := ","
	if version == "1" {
		count, rest, _ := bytes.Cut(t.after, []byte("\n"))
		n, err := strconv.Atoi(string(count))
		if err != nil {
			return nil, fmt.Errorf("sparse map: %w", err)
		}
		numbers, sep = firstLines(rest, 2*n), "\n"
	}
	var extents []erofs.Extent
	at := data
	for numbers != "" {
		var off, n int64
		var err1, err2 error
		off, numbers, err1 = cutNumber(numbers, sep)
		n, numbers, err2 = cutNumber(numbers, sep)
		if err1 != nil || err2 != nil || off < 0 || n < 0 || n > size-(at-data) {
			return nil, fmt.Errorf("sparse map names more data than the %d bytes of the member", size)
		}
		extents = appendExtent(extents, erofs.Extent{Off: off, Len: n, DevOff: at})
		at += n
	}
	if at-data != size {
		return nil, fmt.Errorf("sparse map names %d bytes, the member has %d", at-data, size)
	}
	return extents, nil
}

// firstLines is the text of the first n lines; the padding after them is not
// part of the map.
func firstLines(text []byte, n int) string {
	end := 0
	for range n {
		i := bytes.IndexByte(text[end:], '\n')
		if i < 0 {
			return string(text[:end])
		}
		end += i + 1
	}
	return string(text[:end])
}

func cutNumber(s, sep string) (int64, string, error) {
	number, rest, _ := strings.Cut(s, sep)
	v, err := strconv.ParseInt(number, 10, 64)
	return v, rest, err
}

// appendExtent adds e, as part of its neighbour where both continue each other.
func appendExtent(list []erofs.Extent, e erofs.Extent) []erofs.Extent {
	if e.Len == 0 {
		return list
	}
	if i := len(list) - 1; i >= 0 && list[i].Off+list[i].Len == e.Off && list[i].DevOff+list[i].Len == e.DevOff {
		list[i].Len += e.Len
		return list
	}
	return append(list, e)
}
