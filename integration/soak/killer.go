package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/gantryd/gantry/integration/harness"
)

// killer kills gantryd now and then and starts it again.
type killer struct {
	node *harness.Node
	rnd  *rand.Rand

	mu   sync.Mutex
	last time.Time // when gantryd was up again, or the future while it is down
	n    int
}

func newKiller(n *harness.Node, seed uint64) *killer {
	return &killer{node: n, rnd: rand.New(rand.NewPCG(seed, 1<<32))}
}

// run ends with ctx, and leaves gantryd running.
func (k *killer) run(ctx context.Context) error {
	life := k.between(5*time.Second, 25*time.Second)
	for {
		if pause(ctx, life); ended(ctx) {
			return nil
		}
		k.set(time.Now().Add(time.Hour))
		k.node.KillGantryd()
		pause(ctx, k.between(0, time.Second))
		if err := k.node.StartGantryd(context.WithoutCancel(ctx)); err != nil {
			return fmt.Errorf("gantryd does not start after kill %d: %w", k.n, err)
		}
		k.set(time.Now())
		// One in four is killed while it still puts things in order.
		if life = k.between(5*time.Second, 25*time.Second); k.rnd.IntN(4) == 0 {
			life = k.between(0, 100*time.Millisecond)
		}
	}
}

func (k *killer) between(least, most time.Duration) time.Duration {
	return least + time.Duration(k.rnd.Int64N(int64(most-least)))
}

func (k *killer) set(t time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.last = t; time.Now().Before(t) {
		k.n++
	}
}

// explains says whether gantryd was down, or came back lately, while something that began then went on.
func (k *killer) explains(began time.Time) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.n > 0 && began.Before(k.last.Add(excused))
}

func ended(ctx context.Context) bool { return ctx.Err() != nil }
