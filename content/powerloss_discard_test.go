package content_test

import (
	"context"
	"errors"
	"io"

	"github.com/gantryd/gantry/content"
	"github.com/gantryd/gantry/content/transfer"
)

// discardingTransfer is a transfer whose bytes are given up as a reader goes through them.
type discardingTransfer struct {
	*transfer.Handle
	record *content.Record
}

func (d *discardingTransfer) Record() *content.Record { return d.record }

func (d *discardingTransfer) Wait(ctx context.Context) error {
	buf := make([]byte, 64<<10)
	for off := int64(0); ; d.Discard(off) {
		n, err := d.ReadAt(ctx, buf, off)
		off += int64(n)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
	}
	if err := d.Handle.Wait(ctx); err != nil {
		return err
	}
	sums, err := d.Discarded(ctx)
	d.record = &content.Record{
		Digest: d.Digest(), Size: d.Size(), Chunk: transfer.DiscardChunk, Sums: sums,
		Origins: []content.Origin{{Host: "registry.test", Repository: "test"}},
	}
	return err
}

// Refetch brings a discarded blob back from a host of its own, whose bytes do not count.
func (n *node) Refetch(ctx context.Context, r *content.Record) (content.Refetch, error) {
	for _, p := range n.blobs {
		if p.digest == r.Digest {
			return n.transfers.Join(ctx, "", p.blob(), &host{data: p.data})
		}
	}
	return nil, errors.New("no such blob")
}

// returns is a blob that is discarded, and brought back for good.
func (n *node) returns(ctx context.Context, p *pulled) error {
	if err := n.pull(ctx, p); err != nil {
		return err
	}
	if err := n.store.Restore(ctx, p.digest); err != nil {
		return err
	}
	n.mark("has " + p.name)
	return nil
}
