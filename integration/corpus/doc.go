// Package corpus has images that hold what layers of registries hold, and what hostile ones try. Tests mount each of
// them as gantry and as containerd's overlayfs do and compare all that a container can see.
//
// A [Case] is one subject. [Images] puts the cases that say nothing of the root together, each below a folder of its
// name, so that one pull tries all of them. [Refused] are layers that containerd does not take.
package corpus

// Case is one subject: a tar for each of its layers, lowest first.
type Case struct {
	Name   string
	Layers [][]Member
}

// Image is a stack of tars, lowest first.
type Image struct {
	Name string
	Tars [][]byte
	// Except are the differences from overlayfs that are on purpose.
	Except []Exception
}

// Exception is a difference from overlayfs that is on purpose.
type Exception struct {
	// Line is what the comparison says of it.
	Line string
	// Reason is why it is right.
	Reason string
}

// Refusal is a stack of tars of which the last one is refused.
type Refusal struct {
	Name string
	Tars [][]byte
	// Says is part of what gantry says then: a client shows it.
	Says string
	// Alone says that containerd's overlayfs takes it, and why gantry does not.
	Alone string
}
