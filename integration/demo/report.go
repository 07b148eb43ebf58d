package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"text/tabwriter"
)

// report prints where the time of each layer went, and who fetched what.
func (d *demo) report(ctx context.Context) error {
	s, err := d.status(ctx)
	if err != nil {
		return err
	}
	fmt.Println("\nWhere the time went, in seconds. The phases of a layer overlap: it is decompressed and written while it downloads.")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "layer\tblob\tunpacked\twait\tdownload\tdecompress\twrite\tverify\tcommit\ttotal\t")
	for _, l := range slices.Backward(s.Recent) {
		t := l.Seconds
		fmt.Fprintf(w, "%s\t%s\t%s\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t%.2f\t%s\n", short(l.Digest), mib(l.Size), mib(l.Written),
			t.Wait, t.Download, t.Decompress, t.Write, t.Verify, t.Commit, t.Total, l.Error)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if d.registry == nil {
		return nil
	}
	return d.fetched()
}

func short(dgst string) string {
	_, hex, _ := strings.Cut(dgst, ":")
	return hex[:min(12, len(hex))]
}

// fetched prints the registry's own log of the pull, summed up by client.
func (d *demo) fetched() error {
	log, err := d.registry.Accesses()
	if err != nil {
		return err
	}
	type key struct{ client, what string }
	type sum struct{ requests, bytes int64 }
	sums := map[key]sum{}
	for _, a := range log {
		blob, isBlob := a.Blob()
		if a.Method != http.MethodGet || !isBlob && !a.Manifest() {
			continue
		}
		what := "manifest"
		if isBlob {
			what = "blob " + short(blob.String())
		}
		k := key{a.Client(), what}
		sums[k] = sum{sums[k].requests + 1, sums[k].bytes + a.Bytes}
	}
	keys := make([]key, 0, len(sums))
	for k := range sums {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b key) int { return strings.Compare(a.client+a.what, b.client+b.what) })
	fmt.Println("\nWho fetched what, by the registry's own log:")
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "  client\twhat\trequests\tbytes")
	for _, k := range keys {
		fmt.Fprintf(w, "  %s\t%s\t%d\t%s\n", k.client, k.what, sums[k].requests, mib(sums[k].bytes))
	}
	return w.Flush()
}
