// Package agent runs ClusterLabs fence agents unchanged. An agent is a program
// named fence_* that reads name=value lines from standard input, does one
// action and ends with 0 for success (FenceAgentAPI; facts/cluster.md §2).
//
// What the contract leaves open, or agents get wrong, is settled here:
//
//   - Options go through standard input and never through argv, where everybody
//     could read the passwords. The input lies complete in memory before the
//     agent starts, so that no agent ever sees a part of it.
//   - action= is the first line of every input. An agent without it reboots the
//     node, because that is its default; there is no way to build such an input.
//   - An action is run only if the agent's metadata advertises it. off must be.
//   - Old spellings (port, ipaddr, login, passwd, option …) are turned into those
//     that the metadata names by obsoletes= and deprecated=. option=status as an
//     agent reads it is a reboot.
//   - Each run has its own process group and a time limit. At the limit, at the
//     end of the context and at the end of the agent the whole group is killed:
//     a late child of an agent may power-cycle a healthy node. A timeout is a
//     failure, never a success.
//   - The tail of the output is kept, at most MaxOutput bytes, without secrets.
//
// It decides nothing: fence/plan says what is to be run, node/ records that it is
// about to happen before it calls Run (facts/cluster.md §8 I8).
//
// Cluster row: node and cli may import it; it imports membership/fsm and
// internal leaves.
package agent
