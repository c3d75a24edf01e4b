package raftlog

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

// voterCase is a cluster in one line a node: "name flags". Flags:
//
//	L leader       V voter in raft   N nonvoter in raft   (neither: not in raft)
//	v wants a vote w witness         d not alive          s alive but not stable  b behind
//	status: j joining, m member (default), g leaving, l left, e evicted, f fenced, x no record
func voterInput(lines string) VoterInput {
	in := VoterInput{Health: map[string]Health{}, Index: 10000}
	for i, line := range strings.Split(strings.TrimSpace(lines), "\n") {
		name, flags, _ := strings.Cut(strings.TrimSpace(line), " ")
		has := func(f string) bool { return strings.Contains(flags, f) }
		r := members.Record{Name: name, Index: i + 1, Status: members.Member, Incarnation: 1}
		r.Addresses.Raft = name + ":1"
		r.Roles = members.Roles{Voter: has("v"), Witness: has("w")}
		for f, st := range map[string]members.Status{"j": members.Joining, "g": members.Leaving, "l": members.Left, "e": members.Evicted, "f": members.Fenced} {
			if has(f) {
				r.Status = st
			}
		}
		if !has("x") {
			in.Members = append(in.Members, r)
		}
		addr := name + ":1"
		if has("a") {
			addr = name + ":old"
		}
		if has("V") || has("N") {
			in.Config.Servers = append(in.Config.Servers, Server{ID: name, Address: addr, Voter: has("V")})
		}
		if has("L") {
			in.Leader = name
		}
		if !has("d") {
			h := Health{Alive: true, Stable: time.Minute, Applied: 9990}
			if has("s") {
				h.Stable = time.Second
			}
			if has("b") {
				h.Applied = 100
			}
			in.Health[name] = h
		}
	}
	return in
}

func show(cs []Change) string {
	var s []string
	for _, c := range cs {
		s = append(s, string(c.Op)+" "+c.ID)
	}
	return strings.Join(s, ", ")
}

func TestPlanVoters(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ name, in, want string }{
		{"alone", "n1 LVv", ""},
		{"a second node gets the log, not a vote", "n1 LVv\nn2 vj", "add-nonvoter n2"},
		{"two nodes: two votes would be worse than one", "n1 LVv\nn2 Nv", ""},
		{"the third brings two votes", "n1 LVv\nn2 Nv\nn3 Nv", "add-voter n2, add-voter n3"},
		{"not while one of them is unstable", "n1 LVv\nn2 Nv\nn3 Nvs", ""},
		{"nor behind", "n1 LVv\nn2 Nvb\nn3 Nv", ""},
		{"nor dead", "n1 LVv\nn2 Nvd\nn3 Nv", ""},
		{"joining nodes get no vote", "n1 LVv\nn2 Nvj\nn3 Nv", ""},
		{"nodes that want none get none", "n1 LVv\nn2 N\nn3 Nv", ""},
		{"three stay three with a fourth", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Nv", ""},
		{"five with a fifth", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Nv\nn5 Nv", "add-voter n4, add-voter n5"},
		{"never seven", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Vv\nn5 Vv\nn6 Nv\nn7 Nv", ""},
		{"from one to five at once", "n1 LVv\nn2 Nv\nn3 Nv\nn4 Nv\nn5 Nv\nn6 Nv", "add-voter n2, add-voter n3, add-voter n4, add-voter n5"},
		{"an interrupted pair is completed", "n1 LVv\nn2 Vv\nn3 Nv", "add-voter n3"},
		{"two voters and nobody else stay", "n1 LVv\nn2 Vv", ""},
		{"four without a candidate become three", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Vv", "demote n4"},
		{"four: the witness first", "n1 LVv\nn2 Vw\nn3 Vv\nn4 Vv", "demote n2"},
		{"four with one down wait", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Vve d", ""},
		{"witnesses vote last", "n1 LVv\nn2 Nw\nn3 Nv\nn4 Nv", "add-voter n3, add-voter n4"},
		{"but they do", "n1 LVv\nn2 Nw\nn3 Nv", "add-voter n3, add-voter n2"},
		{"a witness does not lead", "n1 LVw\nn2 Vv\nn3 Vv", "transfer-leadership n2"},
		{"unless nobody else can", "n1 LVw\nn2 Vv d\nn3 Vvb", ""},
		{"an evicted voter keeps its place until it is fenced", "n1 LVv\nn2 Vv\nn3 Vve d\nn4 Nv", ""},
		{"a fenced voter is replaced, then demoted", "n1 LVv\nn2 Vv\nn3 Vvf d\nn4 Nv", "add-voter n4, demote n3"},
		{"a fenced voter without replacement stays", "n1 LVv\nn2 Vv\nn3 Vvf d", ""},
		{"one of five fenced: four is no better than three, but not below", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Vv\nn5 Vvf d", "demote n5, demote n4"},
		{"two of five fenced", "n1 LVv\nn2 Vv\nn3 Vv\nn4 Vvf d\nn5 Vvf d", "demote n4, demote n5"},
		{"a node that left goes", "n1 LVv\nn2 Vv\nn3 Vvl d", "remove n3"},
		{"a leaving one gives its vote back", "n1 LVv\nn2 Vv\nn3 Vvg", "demote n3"},
		{"a leaving one of two", "n1 LVv\nn2 Vvg", "demote n2"},
		{"a leaving leader hands over", "n1 LVvg\nn2 Vv\nn3 Vv", "transfer-leadership n2"},
		{"a removed nonvoter goes", "n1 LVv\nn2 Nx", "remove n2"},
		{"a removed voter goes, replaced", "n1 LVv\nn2 Vv\nn3 Vx d\nn4 Nv", "add-voter n4, remove n3"},
		{"not if the others have no living majority", "n1 LVv\nn2 Vve d\nn3 Vx", ""},
		{"a fenced nonvoter keeps the log for its return", "n1 LVv\nn2 Nvf d", ""},
		{"who does not want a vote any more loses it", "n1 LVv\nn2 Vv\nn3 V\nn4 Nv", "add-voter n4, demote n3"},
		{"a new address, voter and nonvoter", "n1 LVv\nn2 Vva\nn3 Vv\nn4 Nva", "add-voter n2, add-nonvoter n4"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			if d := cmp.Diff(tc.want, show(PlanVoters(voterInput(tc.in)))); d != "" {
				t.Fatalf("%s\n(-want +got):\n%s", tc.in, d)
			}
		})
	}
}

// Whatever the cluster looks like: no step takes the living majority, nobody
// unfit is promoted, the leader keeps its vote, the cap holds, dead members are
// not demoted below MinQuorum, and the plan comes to rest.
func TestPlanVotersProperties(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		n := rapid.IntRange(1, 8).Draw(t, "n")
		var lines []string
		for i := range n {
			flags := rapid.SampledFrom([]string{"V", "V", "N", ""}).Draw(t, "raft") + rapid.SampledFrom([]string{"v", "v", "w", ""}).Draw(t, "role") +
				rapid.SampledFrom([]string{"", "", "d", "s", "b"}).Draw(t, "health") + rapid.SampledFrom([]string{"", "", "", "j", "g", "l", "e", "f", "x"}).Draw(t, "status")
			if i == 0 {
				flags = "LVv"
			}
			lines = append(lines, fmt.Sprintf("n%d %s", i+1, flags))
		}
		in := voterInput(strings.Join(lines, "\n"))
		recs := map[string]members.Record{}
		for _, r := range in.Members {
			recs[r.Name] = r
		}
		live := func() (up, all int) {
			for _, id := range in.Config.Voters() {
				all++
				if in.Health[id].Alive || id == in.Leader {
					up++
				}
			}
			return up, all
		}
		up0, all0 := live()
		quorate := up0 > all0/2
		for round := range 20 {
			plan := PlanVoters(in)
			if len(plan) == 0 || len(plan) == 1 && plan[0].Op == OpTransfer {
				return
			}
			if round == 19 {
				t.Fatalf("no rest: %s\n%s", show(plan), strings.Join(lines, "\n"))
			}
			for _, c := range plan {
				before, _ := in.Config.Find(c.ID)
				switch c.Op {
				case OpAddVoter:
					h := in.Health[c.ID]
					if !before.Voter && (!h.Alive || h.Stable < 10*time.Second || h.Applied < 9000 || recs[c.ID].Status != members.Member || !wantsVote(ptr(recs[c.ID]))) {
						t.Fatalf("promotes %s: %+v", c.ID, h)
					}
				case OpDemote, OpRemove:
					if c.ID == in.Leader {
						t.Fatalf("%s of the leader", c.Op)
					}
					_, all := live()
					if st := recs[c.ID].Status; before.Voter && st == members.Fenced && all <= 3 {
						t.Fatalf("takes the dead %s out of %d voters", c.ID, all)
					}
				case OpAddNonvoter, OpTransfer:
				}
				in.Config = applyChange(in.Config, c)
				up, all := live()
				if quorate && up <= all/2 {
					t.Fatalf("after %s of %s only %d of %d voters live\n%s", c.Op, c.ID, up, all, strings.Join(lines, "\n"))
				}
				if c.Op == OpAddVoter && all > 5 && all > all0 {
					// A replacement may stand beside the one it replaces.
					good := 0
					for _, id := range in.Config.Voters() {
						if r, ok := recs[id]; ok && r.Status == members.Member && wantsVote(&r) {
							good++
						}
					}
					if good > 5 {
						t.Fatalf("%d good voters", good)
					}
				}
			}
		}
	})
}

func ptr(r members.Record) *members.Record { return &r }

func applyChange(c Configuration, ch Change) Configuration {
	var out Configuration
	found := false
	for _, s := range c.Servers {
		if s.ID == ch.ID {
			found = true
			switch ch.Op {
			case OpRemove:
				continue
			case OpDemote:
				s.Voter = false
			case OpAddVoter:
				s.Voter, s.Address = true, ch.Address
			case OpAddNonvoter:
				s.Address = ch.Address
			case OpTransfer:
			}
		}
		out.Servers = append(out.Servers, s)
	}
	if !found && (ch.Op == OpAddNonvoter || ch.Op == OpAddVoter) {
		out.Servers = append(out.Servers, Server{ID: ch.ID, Address: ch.Address, Voter: ch.Op == OpAddVoter})
	}
	return out
}
