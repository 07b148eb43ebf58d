package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

// syncClock sums up how long transactions were committed, in nanoseconds. They are one after the other.
type syncClock struct{ total atomic.Int64 }

// update runs fn in a transaction that is committed if it returns nil.
func (s *Snapshotter) update(ctx context.Context, fn func(context.Context) error) error {
	asked, before := time.Now(), s.syncing.total.Load()
	inner, tx, err := s.ms.TransactionContext(ctx, true)
	if err != nil {
		return err
	}
	// Whose commit was under way when this began is counted in full, so no more than the wait.
	synced := min(time.Since(asked), time.Duration(s.syncing.total.Load()-before))
	defer func() { s.spent(ctx, Syncing, synced) }()
	if err := fn(inner); err != nil {
		return errors.Join(err, tx.Rollback())
	}
	began := time.Now()
	err = tx.Commit()
	took := time.Since(began)
	s.syncing.total.Add(int64(took))
	synced += took
	if err != nil {
		return fmt.Errorf("commit the transaction: %w", err)
	}
	s.databaseChanged()
	return nil
}
