package raftlog

import (
	"cmp"
	"slices"
	"time"

	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
)

// ChangeOp is a step that PlanVoters proposes.
type ChangeOp string

// The steps.
const (
	OpAddNonvoter ChangeOp = "add-nonvoter"
	OpAddVoter    ChangeOp = "add-voter"
	OpDemote      ChangeOp = "demote"
	OpRemove      ChangeOp = "remove"
	OpTransfer    ChangeOp = "transfer-leadership" // to ID
)

// Change is one step, with its reason for logs.
type Change struct {
	Op      ChangeOp
	ID      string
	Address string
	Why     string
}

// Health is what the leader knows of a node from its lease.
type Health struct {
	Alive   bool          // its lease is valid
	Stable  time.Duration // how long without a break
	Applied uint64        // index its state has reached
}

// VoterPolicy bounds what PlanVoters does. Zero fields take the defaults.
type VoterPolicy struct {
	MaxVoters int           // 5
	MinQuorum int           // 3: dead voters are not taken out below so many
	Stabilise time.Duration // 10 s alive before promotion
	MaxLag    uint64        // 250 entries behind the leader still count as caught up
}

func (p VoterPolicy) withDefaults() VoterPolicy {
	p.MaxVoters = cmp.Or(p.MaxVoters, 5)
	p.MinQuorum = cmp.Or(p.MinQuorum, 3)
	p.Stabilise = cmp.Or(p.Stabilise, 10*time.Second)
	p.MaxLag = cmp.Or(p.MaxLag, 250)
	return p
}

// VoterInput is all that PlanVoters looks at.
type VoterInput struct {
	Policy  VoterPolicy
	Members []members.Record // of the state
	Config  Configuration
	Health  map[string]Health // by node; missing = not alive
	Leader  string            // this node
	Index   uint64            // the leader's applied index
}

// PlanVoters says how the raft configuration should change, as ordered steps.
// It is pure. The leader runs the first steps it can, one at a time, and plans
// again with what it then sees; running the whole list is safe too, because
// each step keeps a majority of the voters alive.
//
//   - Every joining, member and leaving node is in the log, first as nonvoter.
//   - Voters are nodes that want to be (Roles.Voter, Roles.Witness), at most
//     MaxVoters, promoted only when caught up and stable, and in pairs, so that
//     their number stays odd: 1, 3, 5. An even number is made odd by promotion
//     when a candidate exists, else, above two, by demotion.
//   - A dead voter is replaced before it is demoted, and without replacement
//     kept while the voters would fall below MinQuorum.
//   - A node that left or was removed goes as soon as the others have a
//     majority without it.
//   - A witness does not lead while another voter can.
func PlanVoters(in VoterInput) []Change {
	p := in.Policy.withDefaults()
	recs := make(map[string]*members.Record, len(in.Members))
	for i := range in.Members {
		recs[in.Members[i].Name] = &in.Members[i]
	}
	alive := func(id string) bool { return id == in.Leader || in.Health[id].Alive }
	present := func(id string) bool { // belongs into the log
		r := recs[id]
		return r != nil && (r.Active() || r.Status == members.Joining)
	}

	var out []Change
	voters := map[string]bool{}
	for _, s := range in.Config.Servers {
		if s.Voter {
			voters[s.ID] = true
		}
	}
	// safe tells whether the voters without id keep a living majority.
	safe := func(without string) bool {
		n, up := 0, 0
		for id := range voters {
			if id == without {
				continue
			}
			n++
			if alive(id) {
				up++
			}
		}
		return n > 0 && up > n/2
	}
	address := func(id string) string {
		if r := recs[id]; r != nil {
			return r.Addresses.Raft
		}
		s, _ := in.Config.Find(id)
		return s.Address
	}
	step := func(op ChangeOp, id, why string) {
		out = append(out, Change{Op: op, ID: id, Address: address(id), Why: why})
		switch op {
		case OpAddVoter:
			voters[id] = true
		case OpDemote, OpRemove:
			delete(voters, id)
		case OpAddNonvoter, OpTransfer:
		}
	}

	// 1. Everybody who belongs here gets the log.
	for _, r := range sortedRecords(in.Members) {
		s, ok := in.Config.Find(r.Name)
		switch {
		case !present(r.Name):
		case !ok:
			step(OpAddNonvoter, r.Name, "it is "+string(r.Status)+" and not in the log")
		case s.Address != r.Addresses.Raft && !s.Voter:
			step(OpAddNonvoter, r.Name, "its address was "+s.Address)
		case s.Address != r.Addresses.Raft && r.Name != in.Leader:
			step(OpAddVoter, r.Name, "its address was "+s.Address)
		}
	}

	// 2. Who may be promoted, best first: full nodes before witnesses, then by
	// node index.
	var cand []*members.Record
	for _, r := range sortedRecords(in.Members) {
		h := in.Health[r.Name]
		s, ok := in.Config.Find(r.Name)
		if r.Status == members.Member && wantsVote(r) && ok && !s.Voter && h.Alive && h.Stable >= p.Stabilise && h.Applied+p.MaxLag >= in.Index {
			cand = append(cand, r)
		}
	}
	slices.SortStableFunc(cand, func(a, b *members.Record) int { return boolInt(a.Roles.Witness) - boolInt(b.Roles.Witness) })

	// 3. Voters that should not be: gone ones, dead ones, unwilling ones.
	type surplus struct {
		id, why string
		gone    bool
		must    bool // goes although MinQuorum is not kept
	}
	var bad []surplus
	for _, s := range in.Config.Servers {
		r := recs[s.ID]
		switch {
		case !s.Voter || s.ID == in.Leader:
		case r == nil:
			bad = append(bad, surplus{s.ID, "it is no member", true, true})
		case r.Status == members.Left:
			bad = append(bad, surplus{s.ID, "it has left", true, true})
		case r.Status == members.Fenced:
			bad = append(bad, surplus{s.ID, "it is fenced", false, false})
		case r.Status == members.Leaving:
			bad = append(bad, surplus{s.ID, "it is leaving", false, true})
		case r.Status == members.Member && !wantsVote(r):
			bad = append(bad, surplus{s.ID, "it does not want a vote", false, false})
		}
	}

	// 4. Good voters decide the aim: odd, at most MaxVoters.
	good := len(voters) - len(bad)
	aim := min(p.MaxVoters, good+len(cand))
	if aim%2 == 0 {
		aim--
	}
	aim = max(aim, good-good%2, 1)
	if aim%2 == 0 && aim > good {
		aim-- // do not promote into an even number
	}
	for ; good < aim && len(cand) > 0; good++ {
		step(OpAddVoter, cand[0].Name, "caught up and stable")
		cand = cand[1:]
	}
	slices.SortStableFunc(bad, func(a, b surplus) int { return boolInt(b.must) - boolInt(a.must) })
	for _, b := range bad {
		if !b.must && len(voters)-1 < min(p.MinQuorum, len(voters)) {
			continue
		}
		if !safe(b.id) {
			continue
		}
		if b.gone {
			step(OpRemove, b.id, b.why)
		} else {
			step(OpDemote, b.id, b.why)
		}
	}

	// 5. Nonvoters that do not belong here any more.
	for _, s := range in.Config.Servers {
		if r := recs[s.ID]; !s.Voter && s.ID != in.Leader && (r == nil || r.Status == members.Left) {
			step(OpRemove, s.ID, "it is no member any more")
		}
	}

	// 6. An even number above two carries a vote that helps nobody; the last
	// node by index gives it back, a witness first.
	// Not while one is down: then the choice waits for its fence or return.
	quiet := true
	for id := range voters {
		quiet = quiet && alive(id)
	}
	if n := len(voters); quiet && (n > p.MinQuorum && n%2 == 0 || n > p.MaxVoters) {
		ids := make([]*members.Record, 0, n)
		for _, r := range sortedRecords(in.Members) {
			if voters[r.Name] && r.Name != in.Leader {
				ids = append(ids, r)
			}
		}
		slices.Reverse(ids)
		slices.SortStableFunc(ids, func(a, b *members.Record) int {
			return boolInt(b.Roles.Witness) - boolInt(a.Roles.Witness)
		})
		for _, r := range ids {
			if n := len(voters); n <= p.MaxVoters && n%2 == 1 {
				break
			}
			if safe(r.Name) {
				step(OpDemote, r.Name, "an even number of voters tolerates no more than one less")
			}
		}
	}

	// 7. A witness, and a node that leaves, hand leadership on. Last: after it
	// this node plans no more.
	if l := recs[in.Leader]; l != nil && (l.Roles.Witness || l.Status == members.Leaving || !present(in.Leader)) {
		for _, r := range sortedRecords(in.Members) {
			h := in.Health[r.Name]
			if voters[r.Name] && r.Name != in.Leader && r.Status == members.Member && !r.Roles.Witness && h.Alive && h.Applied+p.MaxLag >= in.Index {
				why := "the leader is a witness"
				if !l.Roles.Witness {
					why = "the leader is " + string(l.Status)
				}
				step(OpTransfer, r.Name, why)
				break
			}
		}
	}
	return out
}

func wantsVote(r *members.Record) bool { return r.Roles.Voter || r.Roles.Witness }

func sortedRecords(in []members.Record) []*members.Record {
	out := make([]*members.Record, 0, len(in))
	for i := range in {
		out = append(out, &in[i])
	}
	slices.SortFunc(out, func(a, b *members.Record) int { return a.Index - b.Index })
	return out
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}
