package config

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// Encode writes c as a file with a comment for each key. Places that follow from
// root or state are written as comments, so that they go on following. What was
// written loads back to c.
func (c *Config) Encode(w io.Writer) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# gantryd's configuration. Every key is optional.\n")
	table := ""
	for _, f := range fields(c) {
		name := f.key
		if t, rest, ok := strings.Cut(f.key, "."); ok {
			name = rest
			if t != table {
				table = t
				fmt.Fprintf(&b, "\n[%s]\n", t)
			}
		}
		if table == "" || !bytes.HasSuffix(b.Bytes(), []byte("]\n")) {
			b.WriteByte('\n')
		}
		for _, line := range wrap(f.doc, 96) {
			fmt.Fprintf(&b, "# %s\n", line)
		}
		fmt.Fprintf(&b, "# Allowed: %s.\n", f.value.allowed())
		if f.follows() {
			b.WriteString("# ")
		}
		fmt.Fprintf(&b, "%s = %s\n", name, f.value.toml())
	}
	_, err := w.Write(b.Bytes())
	return err
}

// wrap breaks text between words so that no line is longer than width bytes.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && len(line)+1+len(word) > width {
			lines = append(lines, line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}
