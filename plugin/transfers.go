package plugin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/containerd/containerd/v2/pkg/identifiers"
	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/content/transfer"
	"github.com/gantryd/gantry/plugin/config"
	"github.com/gantryd/gantry/plugin/setup"
)

// transfers are the transfer managers: one for all namespaces or, where
// containerd isolates content, one for each, so that no namespace gets bytes
// that another one fetched.
type transfers struct {
	config   *config.Config
	options  transfer.Options
	isolated bool

	mu       sync.Mutex
	closed   bool
	managers map[string]*transfer.Manager // by namespace; "" is the shared one
}

func openTransfers(c *config.Config) (*transfers, error) {
	return openTransfersWith(c, setup.TransferOptions(c))
}

func openTransfersWith(c *config.Config, o transfer.Options) (*transfers, error) {
	t := &transfers{config: c, options: o, isolated: c.Isolated(), managers: make(map[string]*transfer.Manager)}
	if !t.isolated {
		_, err := t.of("")
		return t, err
	}
	return t, t.openAll()
}

// openAll opens the managers of the namespaces that left something behind, for
// the sweep to find it.
func (t *transfers) openAll() error {
	entries, err := os.ReadDir(setup.NamespaceFolders(t.config))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		if _, err := t.of(e.Name()); err != nil && !errdefs.IsInvalidArgument(err) {
			return errors.Join(err, t.Close())
		}
	}
	return nil
}

// of returns the manager of a namespace. It is opened on the first call.
func (t *transfers) of(namespace string) (*transfer.Manager, error) {
	if !t.isolated {
		namespace = ""
	} else if err := identifiers.Validate(namespace); err != nil { // it comes from a request and becomes a folder
		return nil, fmt.Errorf("namespace %q: %w", namespace, err)
	}
	folder := setup.TransferFolder(t.config, namespace)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, fmt.Errorf("gantryd is shutting down: %w", errdefs.ErrUnavailable)
	}
	if m, ok := t.managers[namespace]; ok {
		return m, nil
	}
	m, err := transfer.New(folder, t.options)
	if err != nil {
		return nil, fmt.Errorf("open the transfers in %s: %w", folder, err)
	}
	t.managers[namespace] = m
	return m, nil
}

func (t *transfers) all() []*transfer.Manager {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []*transfer.Manager
	for _, namespace := range slices.Sorted(maps.Keys(t.managers)) {
		all = append(all, t.managers[namespace])
	}
	return all
}

// list returns the transfers of all namespaces.
func (t *transfers) list() []transfer.Status {
	var all []transfer.Status
	for _, m := range t.all() {
		all = append(all, m.List()...)
	}
	return all
}

// sweep removes what no store needs any more and nobody came back for.
func (t *transfers) sweep(ctx context.Context) error {
	var errs []error
	for _, m := range t.all() {
		errs = append(errs, m.Sweep(ctx))
	}
	return errors.Join(errs...)
}

// makeRoom has one transfer removed that nobody came back for; false says that there is none.
func (t *transfers) makeRoom() bool {
	return slices.ContainsFunc(t.all(), (*transfer.Manager).MakeRoom)
}

// Close stops all transfers; they can be resumed.
func (t *transfers) Close() error {
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	var errs []error
	for _, m := range t.all() {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}
