package storage

import (
	"fmt"
	"strconv"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/latency"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/target"
)

// Answer tells numbers and events; nothing waits for it.
func (w *worker) Answer(t link.Type, body func(any) error) (any, error) {
	switch t {
	case link.TStats:
		return w.stats(), nil
	case link.TEvents:
		var q link.EventsAfter
		if err := body(&q); err != nil {
			return nil, err
		}
		return w.answerEvents(q), nil
	}
	return nil, fmt.Errorf("%s: unknown question", t)
}

// stats are the numbers of this worker, with the names that users gave.
func (w *worker) stats() api.NodeStats {
	w.mu.Lock()
	want := w.mu.want
	w.mu.Unlock()
	node, names := "", map[string]string{}
	if want != nil {
		node = want.node
		for id, v := range want.storage.Volumes {
			names[id] = v.Name
		}
	}
	s := w.srv.Stats()
	out := api.NodeStats{Node: node, Time: w.clock.Wall(), Worker: w.incarnation, LUNs: []api.LUNStats{}, Sessions: []api.Session{},
		Logins: s.Logins, Discoveries: s.Discoveries, Logouts: s.Logouts, Drops: s.Drops, Refused: s.Refused, AuthFailures: s.AuthFailures,
		DigestErrors: s.DigestErrors, Retransmits: s.Retransmits, Rejects: s.Rejects, PendingBytes: s.PendingBytes}
	for i := range s.LUNs {
		l := &s.LUNs[i]
		name := names[l.Volume]
		if name == "" {
			name = l.Volume
		}
		out.LUNs = append(out.LUNs, api.LUNStats{Node: node, Target: l.Target, LUN: int(l.Number), Volume: name, UUID: l.Volume,
			Sessions: l.Sessions, IOStats: ioOf(&l.IOStats)})
	}
	for i := range s.Sessions {
		x := &s.Sessions[i]
		a := sessionOf(node, *x)
		io := ioOf(&x.IOStats)
		a.IO = &io
		a.Local, a.Alias, a.User, a.Discovery, a.Connections = x.Local.String(), x.InitiatorAlias, x.User, x.Discovery, x.Connections
		a.DigestErrors, a.Retransmits, a.Rejects = x.DigestErrors, x.Retransmits, x.Rejects
		a.Params = paramsOf(x)
		out.Sessions = append(out.Sessions, a)
	}
	return out
}

func ioOf(i *target.IOStats) api.IOStats {
	out := api.IOStats{Commands: i.Commands, InProgress: i.InProgress, Reads: i.Reads(), Writes: i.Writes(), Unmaps: i.Unmaps,
		ReadBytes: i.ReadBytes, WriteBytes: i.WriteBytes, Aborted: i.Aborted, Latency: map[string]latency.Histogram{}}
	for k, n := range i.Errors {
		if n > 0 {
			if out.Errors == nil {
				out.Errors = map[string]uint64{}
			}
			out.Errors[target.ErrorKinds[k]] = n
		}
	}
	for c, h := range i.Latency {
		if h.Count() > 0 {
			out.Latency[target.IOClass(c).String()] = h
		}
	}
	return out
}

// paramsOf is what was negotiated, by the names of RFC 7143 section 13.
func paramsOf(s *target.SessionInfo) map[string]string {
	p := &s.Params
	yes := func(b bool) string {
		if b {
			return "Yes"
		}
		return "No"
	}
	digest := func(b bool) string {
		if b {
			return "CRC32C"
		}
		return "None"
	}
	m := map[string]string{"HeaderDigest": digest(p.HeaderDigest), "DataDigest": digest(p.DataDigest),
		"TargetRecvDataSegmentLength": strconv.Itoa(p.MaxRecv), "InitiatorRecvDataSegmentLength": strconv.Itoa(p.MaxSend)}
	if s.Discovery { // the rest does not matter there (RFC 7143 13)
		return m
	}
	m["MaxConnections"], m["ErrorRecoveryLevel"] = strconv.Itoa(p.MaxConnections), strconv.Itoa(p.ErrorRecoveryLevel)
	m["InitialR2T"], m["ImmediateData"] = yes(p.InitialR2T), yes(p.ImmediateData)
	m["MaxBurstLength"], m["FirstBurstLength"], m["MaxOutstandingR2T"] = strconv.Itoa(p.MaxBurstLength), strconv.Itoa(p.FirstBurstLength), strconv.Itoa(p.MaxOutstandingR2T)
	m["DataPDUInOrder"], m["DataSequenceInOrder"] = yes(p.DataPDUInOrder), yes(p.DataSequenceInOrder)
	m["DefaultTime2Wait"], m["DefaultTime2Retain"] = strconv.Itoa(p.DefaultTime2Wait), strconv.Itoa(p.DefaultTime2Retain)
	return m
}
