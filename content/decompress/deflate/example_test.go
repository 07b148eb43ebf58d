package deflate_test

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"strings"

	"github.com/gantryd/gantry/content/decompress/deflate"
)

func compress(s string) []byte {
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	_, _ = io.WriteString(w, s) // a bytes.Buffer takes everything
	_ = w.Close()
	return b.Bytes()
}

func ExampleNewReader() {
	r, err := deflate.NewReader(bytes.NewReader(compress("range by range\n")))
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // nothing to lose
	if _, err := io.Copy(os.Stdout, r); err != nil {
		fmt.Println(err)
	}
	// Output: range by range
}

func ExampleNewReaderAt() {
	// Workers read a file for themselves, each where its chunk is.
	in := strings.NewReader(string(compress(strings.Repeat("tar ", 1000))))
	r, err := deflate.NewReaderAt(in, deflate.WithWorkers(4))
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // nothing to lose
	n, err := r.WriteTo(io.Discard)
	fmt.Println(n, err)
	// Output: 4000 <nil>
}

func ExampleReader_Next() {
	r, err := deflate.NewReader(bytes.NewReader(compress("no copy is made")))
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // nothing to lose
	for {
		block, release, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s\n", block)
		release() // may be called later, and by another goroutine
	}
	// Output: no copy is made
}

func ExampleWithMemory() {
	budget := 2 * deflate.Memory(1)
	r, err := deflate.NewReader(bytes.NewReader(compress("on one worker, if need be")),
		deflate.WithMemory(
			func(n int64) bool { return n <= budget },
			func(int64) {},
		))
	if err != nil {
		log.Fatal(err)
	}
	defer r.Close() //nolint:errcheck // nothing to lose
	data, err := io.ReadAll(r)
	fmt.Println(string(data), err)
	// Output: on one worker, if need be <nil>
}
