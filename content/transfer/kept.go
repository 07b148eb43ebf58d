package transfer

import (
	"io/fs"
	"os"
	"path/filepath"
	"sync"
)

// kept knows what lies in a root, so that telling it costs little: a state file is read again only when it changed.
type kept struct {
	root string

	mu   sync.Mutex
	seen map[string]keptFolder
}

type keptFolder struct {
	state  fs.FileInfo
	status Status
}

// list describes the folders that hold bytes of a blob which nobody links. What cannot be read is left out.
func (k *kept) list() []Status {
	entries, err := os.ReadDir(k.root)
	if err != nil {
		return nil
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	var list []Status
	seen := make(map[string]keptFolder, len(k.seen))
	for _, e := range entries {
		if folderDigest(e.Name()) == "" || !e.IsDir() {
			continue
		}
		data, err := os.Lstat(filepath.Join(k.root, e.Name(), dataName))
		if err != nil || links(data) > 1 {
			continue
		}
		f, ok := k.look(e.Name())
		if !ok {
			continue
		}
		seen[e.Name()] = f
		if f.status.Received > 0 || f.status.Size == 0 {
			list = append(list, f.status)
		}
	}
	k.seen = seen
	return list
}

func (k *kept) look(name string) (keptFolder, bool) {
	path := filepath.Join(k.root, name, stateName)
	st, err := os.Lstat(path)
	if err != nil {
		return keptFolder{}, false
	}
	if f, ok := k.seen[name]; ok && os.SameFile(f.state, st) && f.state.Size() == st.Size() && f.state.ModTime().Equal(st.ModTime()) {
		return f, true
	}
	log, err := peekState(path)
	if err != nil {
		return keptFolder{}, false
	}
	b := log.blob()
	received, frontier := log.progress()
	return keptFolder{st, Status{
		Digest: b.Digest, Size: b.Size, Frontier: frontier, Received: received, Phase: PhaseKept, Started: st.ModTime(),
	}}, true
}
