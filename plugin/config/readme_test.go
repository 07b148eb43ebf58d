package config

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// readmeTable is the README's configuration table, made from the fields.
func readmeTable() string {
	var b strings.Builder
	b.WriteString("| key | default | allowed | meaning |\n|---|---|---|---|\n")
	for _, f := range fields(Default()) {
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s |\n", f.key, f.value.toml(), f.value.allowed(), f.doc)
	}
	return b.String()
}

func TestReadmeListsTheDefaults(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "<!-- config:")
	_, rest, _ = strings.Cut(rest, "-->\n")
	got, _, found := strings.Cut(rest, "<!-- /config -->")
	if want := readmeTable(); !found || got != want {
		t.Errorf("the README's configuration table is out of date. Put this between its config comments:\n%s", want)
	}
}
