package control

import (
	"fmt"
	"net"
	"slices"
	"sort"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/membership/fsm/fencing"
	"github.com/blockhouse-san/blockhouse/membership/fsm/members"
	fsmpr "github.com/blockhouse-san/blockhouse/membership/fsm/pr"
	"github.com/blockhouse-san/blockhouse/membership/fsm/storage"
)

// picture is everything that status is computed from, at one moment.
type picture struct {
	Node    string // who answers
	Version string
	Index   uint64
	Stale   bool // no proof that a leader would say the same
	Profile string
	Members *members.State
	Fences  []fencing.Open
	// FenceWhy is what each waits for, by node; only the leader knows.
	FenceWhy map[string]string
	History  []fencing.Record
	Storage  *storage.State
	Reserved *fsmpr.State
	Raft     raftPicture
	// Leases: what only the leader knows. Nil elsewhere.
	Leases map[string]leasePicture
}

type raftPicture struct {
	Leader    string
	Voters    []string
	NonVoters []string
	Term      uint64
	Commit    uint64
}

type leasePicture struct {
	Left     time.Duration
	Renewed  bool // at all, with this leader
	Workers  map[string]api.Worker
	Volumes  []volumeReport
	Sessions []api.Session
}

// statusOf computes the status document. Pure.
func statusOf(p picture) api.Status {
	s := api.Status{APIVersion: api.Version, Stale: p.Stale, Cluster: p.Members.Name, UUID: p.Members.UUID,
		Node: p.Node, Version: p.Version, Epoch: p.Members.Epoch, View: p.Members.View, Index: p.Index,
		Problems: []api.Problem{}, Fences: []api.Fence{}}
	s.Nodes = nodesOf(p)
	s.Quorum = quorumOf(p, s.Nodes)
	s.Volumes = volumesOf(p)
	s.Targets = targetsOf(p, s.Volumes)
	s.LUNs = []api.LUN{}
	for _, t := range s.Targets {
		s.LUNs = append(s.LUNs, t.LUNs...)
	}
	for _, f := range p.Fences {
		s.Fences = append(s.Fences, fenceOf(f, p.FenceWhy[f.Node]))
	}
	s.Problems = problemsOf(p, &s)
	s.Health = api.HealthOK
	rank := map[api.Health]int{api.HealthOK: 0, api.HealthDegraded: 1, api.HealthFaulted: 2, api.HealthNoQuorum: 3}
	for _, pr := range s.Problems {
		if rank[pr.Severity] > rank[s.Health] {
			s.Health = pr.Severity
		}
	}
	return s
}

func roleNames(r members.Roles) []string {
	out := []string{}
	for _, e := range []struct {
		on   bool
		name string
	}{{r.Voter, "voter"}, {r.Storage, "storage"}, {r.Host, "host"}, {r.Witness, "witness"}} {
		if e.on {
			out = append(out, e.name)
		}
	}
	return out
}

func nodesOf(p picture) []api.Node {
	out := []api.Node{}
	for _, r := range p.Members.List() {
		n := api.Node{Name: r.Name, Index: r.Index, Incarnation: r.Incarnation, BootID: r.BootID,
			Roles: roleNames(r.Roles), Raft: r.Addresses.Raft, API: r.Addresses.API, Gossip: r.Addresses.Gossip,
			Portals: addressesOf(&r), Initiator: r.InitiatorName, Control: "unknown", Format: r.Format}
		switch {
		case p.Raft.Leader == r.Name:
			n.Vote = "leader"
		case slices.Contains(p.Raft.Voters, r.Name):
			n.Vote = "voter"
		case slices.Contains(p.Raft.NonVoters, r.Name):
			n.Vote = "nonvoter"
		default:
			n.Vote = "none"
		}
		switch r.Status {
		case members.Joining:
			n.State = api.NodeJoining
		case members.Left:
			n.State = api.NodeLeft
		case members.Evicted:
			n.State = api.NodeLost
		case members.Fenced:
			n.State = api.NodeFenced
		default: // member, leaving
			n.State = api.NodeUnknown
			if l, ok := p.Leases[r.Name]; ok && !p.Stale {
				n.State, n.Control = api.NodeOnline, "up"
				if !l.Renewed || l.Left <= 0 {
					n.State, n.Control = api.NodeSuspect, "down"
				}
				n.LeaseLeft = l.Left
				n.Workers = l.Workers
			}
			if r.Status == members.Leaving {
				n.State = api.NodeLeaving
			}
		}
		for _, h := range p.History {
			if h.Node == r.Name {
				n.Since = h.At
				n.Reason = h.Text
				if h.Event == fencing.EventFenced && h.Evidence != nil {
					n.Reason = evidenceText(*h.Evidence)
				}
			}
		}
		if r.Active() {
			n.Reason = ""
		}
		out = append(out, n)
	}
	return out
}

func quorumOf(p picture, nodes []api.Node) api.Quorum {
	q := api.Quorum{Quorate: !p.Stale && p.Raft.Leader != "", Leader: p.Raft.Leader, Voters: append([]string{}, p.Raft.Voters...),
		Online: []string{}, Needed: len(p.Raft.Voters)/2 + 1, Term: p.Raft.Term, Commit: p.Raft.Commit, Profile: p.Profile}
	sort.Strings(q.Voters)
	for _, n := range nodes {
		if slices.Contains(q.Voters, n.Name) && n.State == api.NodeOnline {
			q.Online = append(q.Online, n.Name)
		}
	}
	q.Survives = max(0, len(q.Online)-q.Needed)
	return q
}

func volumesOf(p picture) []api.Volume {
	out := []api.Volume{}
	for _, v := range p.Storage.ListVolumes() {
		a := api.Volume{Name: v.Name, UUID: v.Config.UUID, Size: v.Config.Size, BlockSize: v.Config.BlockSize,
			State: string(v.State), Epoch: v.Config.Epoch, Primary: v.Config.Primary,
			ISR: append([]string{}, v.Config.ISR...), Replicas: v.Config.Members(), LUNs: []string{}, Store: v.Store, Integrity: v.Integrity}
		for _, l := range p.Storage.LUNsOf(v.Config.UUID) {
			a.LUNs = append(a.LUNs, fmt.Sprintf("%s/%d", l.Target, l.Number))
		}
		a.Health, a.Cause = volumeHealth(p, &v)
		for _, r := range p.Leases[v.Config.Primary].Volumes {
			if r.UUID == v.Config.UUID {
				a.Checksums = r.Checks.api()
			}
		}
		out = append(out, a)
	}
	return out
}

func volumeHealth(p picture, v *storage.Volume) (api.Health, string) {
	prim := p.Members.Members[v.Config.Primary]
	only := ""
	if len(v.Config.ISR) == 1 {
		only = "its only copy is on "
	} else {
		only = "its primary is "
	}
	switch {
	case prim == nil:
		return api.HealthFaulted, only + v.Config.Primary + ", which is no member any more"
	case !prim.Active():
		word := map[members.Status]string{members.Evicted: "lost", members.Fenced: "fenced", members.Left: "gone"}[prim.Status]
		if word == "" {
			word = string(prim.Status)
		}
		return api.HealthFaulted, only + v.Config.Primary + ", which is " + word
	case p.Stale || p.Leases == nil:
		return api.HealthNoQuorum, "nobody may say without a quorum"
	}
	l := p.Leases[v.Config.Primary]
	if !l.Renewed || l.Left <= 0 {
		return api.HealthFaulted, only + v.Config.Primary + ", which does not answer"
	}
	if v.State == storage.Creating {
		return api.HealthDegraded, "the store is being made on " + v.Config.Primary
	}
	if v.State == storage.Removing {
		return api.HealthDegraded, "it is being removed"
	}
	for _, r := range l.Volumes {
		if r.UUID != v.Config.UUID {
			continue
		}
		if r.State != "serving" {
			return api.HealthFaulted, v.Config.Primary + " says: " + strings.TrimSuffix(r.State+": "+r.Error, ": ")
		}
		if c := r.Checks; c != nil && c.BadUnits > 0 {
			return api.HealthDegraded, fmt.Sprintf("%d blocks of 4 KiB do not match their checksums; run clusteradm volume show %s", c.BadUnits, v.Name)
		}
		if len(v.Config.ISR) == 1 {
			return api.HealthDegraded, "not redundant: one copy"
		}
		return api.HealthOK, ""
	}
	if w, ok := l.Workers["storage"]; ok && w.State != "down" {
		return api.HealthFaulted, "the storage worker of " + v.Config.Primary + " does not serve it yet"
	}
	return api.HealthFaulted, "the storage worker of " + v.Config.Primary + " is down"
}

func targetsOf(p picture, vols []api.Volume) []api.Target {
	byID := map[string]api.Volume{}
	for _, v := range vols {
		byID[v.UUID] = v
	}
	sessions := map[string]int{}
	for _, l := range p.Leases {
		for _, s := range l.Sessions {
			sessions[s.Target]++
		}
	}
	out := []api.Target{}
	for _, t := range p.Storage.ListTargets() {
		a := api.Target{IQN: t.IQN, TID: t.TID, Alias: t.Alias, LUNs: []api.LUN{}, Portals: []string{}, Sessions: sessions[t.IQN],
			ACL:      api.ACL{Open: t.ACL.Open, Initiators: append([]string{}, t.ACL.Initiators...), Addresses: append([]string{}, t.ACL.CIDRs...)},
			Incoming: t.Auth.Incoming, Outgoing: t.Auth.Outgoing, Params: t.Params, Offline: t.Offline}
		for _, r := range p.Members.List() {
			if r.Active() && r.Roles.Storage {
				for _, ad := range addressesOf(&r) {
					a.Portals = append(a.Portals, fmt.Sprintf("%s,%d", ad, r.Index))
				}
			}
		}
		for _, n := range t.Numbers() {
			l := t.LUNs[n]
			v := byID[l.Volume]
			x := api.LUN{Target: t.IQN, LUN: n, Volume: v.Name, Generation: l.Generation, ReadOnly: l.ReadOnly, Removable: l.Removable, NoCache: l.NoCache, State: v.Health, URLs: []string{}}
			if sv := p.Storage.Volumes[l.Volume]; sv != nil {
				x.WWID = "3" + sv.Identity.NAA
				if prim := p.Members.Members[sv.Config.Primary]; prim != nil {
					for _, ad := range addressesOf(prim) {
						x.URLs = append(x.URLs, fmt.Sprintf("iscsi://%s/%s/%d", ad, t.IQN, n))
					}
				}
			}
			a.LUNs = append(a.LUNs, x)
		}
		out = append(out, a)
	}
	return out
}

func fenceOf(f fencing.Open, why string) api.Fence {
	if why == "" {
		why = "an operator who has reset it: clusteradm fence_manual " + f.Node
	}
	return api.Fence{Node: f.Node, Incarnation: f.Incarnation, Epoch: f.Epoch, Since: f.Since, Reason: f.Reason,
		Attempts: f.Attempts, Waiting: why}
}

func evidenceText(e fencing.Evidence) string {
	switch e.Method {
	case fencing.Manual:
		return "manual: " + e.Operator + ": " + e.Reason
	}
	return strings.TrimSuffix(string(e.Method)+": "+e.Output, ": ")
}

func fenceEventOf(r fencing.Record) api.FenceEvent {
	ev := map[fencing.Event]string{fencing.EventEvicted: "evict", fencing.EventStart: "start", fencing.EventEnd: "end",
		fencing.EventFenced: "fenced", fencing.EventAdmit: "admit"}[r.Event]
	out := api.FenceEvent{Index: r.Index, Time: r.At, Node: r.Node, Incarnation: r.Incarnation, Epoch: r.Epoch,
		Event: ev, Method: string(r.Method), Reason: r.Text}
	if r.Evidence != nil {
		out.Method, out.Operator, out.Evidence = string(r.Evidence.Method), r.Evidence.Operator, r.Evidence.Output
		if r.Evidence.Reason != "" {
			out.Reason = r.Evidence.Reason
		}
	}
	return out
}

func problemsOf(p picture, s *api.Status) []api.Problem {
	out := []api.Problem{}
	add := func(sev api.Health, what, cause, action, cmd string) {
		out = append(out, api.Problem{Severity: sev, What: what, Cause: cause, Action: action, Command: cmd})
	}
	q := s.Quorum
	if !q.Quorate {
		add(api.HealthNoQuorum, "there is no quorum",
			fmt.Sprintf("%s cannot reach a leader; %d of %d voters must be up", p.Node, q.Needed, len(q.Voters)),
			"start clusterd on the other voters ("+strings.Join(q.Voters, ", ")+") or mend the network between them; what is shown is as of index "+fmt.Sprint(p.Index), "")
	}
	for _, n := range s.Nodes {
		switch n.State {
		case api.NodeLost:
			cause := n.Reason
			for _, f := range s.Fences {
				if f.Node == n.Name && f.Waiting != "" {
					cause += "; the fence waits for: " + f.Waiting
				}
			}
			add(api.HealthDegraded, "node "+n.Name+" is lost; its fence is pending", cause,
				"start it again, or reset it by hand and then say so", "clusteradm fence_manual "+n.Name)
		case api.NodeFenced:
			add(api.HealthDegraded, "node "+n.Name+" is fenced and not back", n.Reason,
				"start clusterd on it, or remove it from the cluster", "clusteradm node remove "+n.Name)
		case api.NodeSuspect:
			add(api.HealthDegraded, "node "+n.Name+" does not renew its lease", "its control process or its network is down",
				"nothing yet: it comes back or is evicted within seconds", "")
		case api.NodeOnline:
			for _, k := range []string{"storage", "locks"} {
				if w, ok := n.Workers[k]; ok && w.State == "down" {
					add(api.HealthFaulted, "the "+k+" worker of "+n.Name+" is down", "it ended or cannot start",
						"read the log of clusterd on "+n.Name+"; it is started again by itself", "")
				} else if ok && w.Error != "" {
					add(api.HealthFaulted, "the "+k+" worker of "+n.Name+" cannot do what the cluster wants", w.Error,
						"mend that on "+n.Name+"; it is tried again every second", "")
				}
				for _, x := range n.Workers[k].Portals {
					if x.State == "failed" && x.From == "cluster" { // those of the file are the worker's error
						add(api.HealthDegraded, "portal "+x.Address+" of "+n.Name+" is not open", x.Error,
							"mend that on "+n.Name+", it is tried again every second; or take the portal away", "clusteradm portal rm "+n.Name+" "+x.Address)
					}
				}
			}
		}
	}
	if q.Quorate {
		switch nv := len(q.Voters); {
		case nv == 1:
			add(api.HealthDegraded, "one voter: its loss stops the cluster", "fewer than three nodes may vote",
				"join nodes until there are three", "clusteradm token create")
		case nv%2 == 0:
			add(api.HealthDegraded, fmt.Sprintf("%d voters survive no more than %d would", nv, nv-1), "the number of voters is even",
				"join another node, or let one leave", "clusteradm token create")
		case q.Survives == 0:
			add(api.HealthDegraded, "no further voter may fail", fmt.Sprintf("%d of %d voters are up", len(q.Online), nv),
				"bring the others back", "")
		}
	}
	for _, v := range s.Volumes {
		name := "volume " + v.Name
		if len(v.LUNs) > 0 {
			name += " (" + strings.Join(v.LUNs, ", ") + ")"
		}
		switch v.Health {
		case api.HealthFaulted:
			act, cmd := "bring "+v.Primary+" back: nothing else has the data", ""
			if r := p.Members.Members[v.Primary]; r != nil && r.Active() {
				act = "read the log of clusterd on " + v.Primary
			}
			add(api.HealthFaulted, name+" is down", v.Cause, act, cmd)
		case api.HealthDegraded:
			act := "wait"
			if v.State == string(storage.Ready) {
				act = "keep a backup: the loss of " + v.Primary + " is the loss of the data"
			}
			add(api.HealthDegraded, name+" is degraded", v.Cause, act, "")
		}
	}
	return out
}

// hostOf is the host part of an address.
func hostOf(addr string) string {
	h, _, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	return h
}
