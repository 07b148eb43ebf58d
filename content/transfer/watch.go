package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// errNoProgress: no host brought anything for too long.
var errNoProgress = errors.New("no progress")

// watch ends the transfer when nothing moves for too long. Time spent only queueing for a connection does not count:
// it is not the host's fault.
func (j *job) watch(ctx context.Context, stop context.CancelCauseFunc) {
	for {
		limit := j.opts.GiveUp
		if j.received.Load() == 0 {
			limit = min(limit, j.opts.FirstContact)
		}
		idle := time.Since(time.Unix(0, j.progress.Load()))
		if idle >= limit {
			stop(j.stuck(limit))
			return
		}
		tick := min(limit-idle, max(limit/10, time.Millisecond))
		if sleep(ctx, tick) != nil {
			return
		}
		if j.queueing() {
			j.progress.Add(int64(tick))
		}
	}
}

func (j *job) queueing() bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.open == 0 && j.queued > 0
}

// stuck decides that the transfer ends for lack of progress, and says why. A host that is asked alone ends only its turn.
func (j *job) stuck(limit time.Duration) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.doomed = j.only == ""
	last := j.lastErr
	if last == nil {
		last = fmt.Errorf("%s: no reply", j.asked())
	}
	return fmt.Errorf("%w for %s, %d of %d bytes are there: %w: %w",
		errNoProgress, limit, j.ledger.there(), j.blob.Size, errdefs.ErrUnavailable, last)
}

// asked names the hosts and how often they were asked. Called with mu held.
func (j *job) asked() string {
	text := "no host"
	for i, s := range j.sources {
		if i == 0 {
			text = ""
		} else {
			text += ", "
		}
		text += fmt.Sprintf("host %s, attempt %d", s.host.name, s.host.attempts)
	}
	return text
}

// oneLine joins errors for people; errors.Is finds each of them.
func oneLine(errs []error) error {
	var all error
	for _, e := range errs {
		if all == nil {
			all = e
		} else {
			all = fmt.Errorf("%w; %w", all, e)
		}
	}
	return all
}
