package snapshotter

import "os"

// Status describes a Snapshotter for people.
type Status struct {
	// Mode is how layers become visible, never ModeAuto, and Reason why.
	Mode   Mode
	Reason string
	// IDMapped: user namespaces see layers through id-mapped mounts. Otherwise
	// NotIDMapped says why not.
	IDMapped    bool
	NotIDMapped string
	// Upper is where new containers' changes are kept, and UpperSize how much a
	// file holds, in bytes; zero for directories.
	Upper     Upper
	UpperSize int64
	// TarLayers and Directories count the folders of either kind; active
	// snapshots are directories until they adopt a layer.
	TarLayers, Directories int
	// UpperFiles counts those of the directories that are in files.
	UpperFiles int
	// Mounted counts the tar layers that are mounted now.
	Mounted int
	// Busy counts the layers the worker is mounting or writing an index for.
	Busy int
}

// Status looks at the disk; it is meant for a command line, not for a loop.
func (s *Snapshotter) Status() Status {
	st := Status{Mode: s.mode, Reason: s.reason, Upper: UpperDirectory, IDMapped: s.unmapped == nil, Busy: s.work.busy()}
	if s.unmapped != nil {
		st.NotIDMapped = s.unmapped.Error()
	}
	if s.uppers != nil {
		st.Upper, st.UpperSize = UpperFile, s.uppers.size
	}
	entries, err := os.ReadDir(s.snapshotsDir())
	if err != nil {
		return st
	}
	for _, e := range entries {
		switch id := e.Name(); {
		case !isID(id):
		case s.isTar(id):
			st.TarLayers++
			if s.mounted(id) {
				st.Mounted++
			}
		default:
			st.Directories++
			if s.hasUpperFile(id) {
				st.UpperFiles++
			}
		}
	}
	return st
}
