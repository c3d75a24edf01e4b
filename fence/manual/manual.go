// Package manual is fencing by an operator: the node was reset by hand and
// somebody says so. It holds the texts and rules as pure functions; cli prints
// and reads, node/ commits the record.
//
// The texts are those of fence_ack_manual (facts/cluster.md §1.1), because
// operators and runbooks know them.
package manual

import (
	"fmt"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
)

// Word is the only answer that proceeds.
const Word = "absolutely"

// Prompt is printed after Warning, without a newline.
const Prompt = "Continue [NO/" + Word + "]? "

// Warning is the text before the prompt: two lines and a blank one, as
// fence_ack_manual prints them.
func Warning(node string) string {
	return "About to override fencing for " + node + ".\nImproper use of this command can cause severe file system damage.\n\n"
}

// Accepted tells whether an answer proceeds: the word alone, as it is spelled,
// with nothing but white space at its ends.
func Accepted(answer string) bool { return strings.TrimSpace(answer) == Word }

// Confirmed tells whether --yes-i-reset-it names the node that is meant: the
// flag repeats the name, so that a script's wrong variable is caught.
func Confirmed(node, flag string) error {
	if flag == node && node != "" {
		return nil
	}
	return &fsm.Error{
		Kind: fsm.KindInvalid, Op: "fence_manual", Object: node,
		Why:  fmt.Sprintf("--yes-i-reset-it names %q", flag),
		Next: "repeat the node: --yes-i-reset-it " + node,
	}
}

// Find gives the open fence of a node. Without one it is fence.ErrNoOpenFence:
// the node is not waiting for anybody.
func Find(open []fencing.Open, node string) (fencing.Open, error) {
	for _, o := range open {
		if o.Node == node {
			return o, nil
		}
	}
	e := &fsm.Error{Kind: fsm.KindNoOpenFence, Op: "fence_manual", Object: node, Why: "no fence of this node is open", Next: "run clusteradm status"}
	if len(open) > 0 {
		names := make([]string, len(open))
		for i, o := range open {
			names[i] = o.Node
		}
		e.Why += "; open fences: " + strings.Join(names, ", ")
		e.Next = "run clusteradm fence list"
	}
	return fencing.Open{}, e
}

// Record is the command to commit once the operator has said the word. A
// reason is asked for, because the history is read after the damage.
func Record(o fencing.Open, operator, reason string, now time.Time) (fencing.Fenced, error) {
	if operator = strings.TrimSpace(operator); operator == "" {
		return fencing.Fenced{}, &fsm.Error{Kind: fsm.KindInvalid, Op: "fence_manual", Object: o.Node, Why: "operator is missing"}
	}
	if reason = strings.TrimSpace(reason); reason == "" {
		return fencing.Fenced{}, &fsm.Error{Kind: fsm.KindInvalid, Op: "fence_manual", Object: o.Node, Why: "reason is missing", Next: "say with --reason how the node was reset"}
	}
	return fencing.Fenced{
		Now: now.UTC(), Node: o.Node, Epoch: o.Epoch,
		Evidence: fencing.Evidence{Method: fencing.Manual, Operator: operator, Reason: reason},
	}, nil
}
