package verbs

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/cli/size"
)

// writeIO writes counters and latencies below each other.
func writeIO(w io.Writer, i *api.IOStats, indent string) {
	fmt.Fprintf(w, "%scommands %d, in progress %d, aborted %d, unmaps %d\n", indent, i.Commands, i.InProgress, i.Aborted, i.Unmaps)
	fmt.Fprintf(w, "%sread %s in %d, written %s in %d\n", indent, size.Format(clamp(i.ReadBytes)), i.Reads, size.Format(clamp(i.WriteBytes)), i.Writes)
	var errs []string
	for _, k := range slices.Sorted(maps.Keys(i.Errors)) {
		errs = append(errs, fmt.Sprintf("%s %d", clean(k), i.Errors[k]))
	}
	if len(errs) > 0 {
		fmt.Fprintf(w, "%snot GOOD: %s\n", indent, strings.Join(errs, ", "))
	}
	for _, op := range []string{"read", "write", "other"} {
		if h := i.Latency[op]; h.Count() > 0 {
			fmt.Fprintf(w, "%slatency of %s: mean %s, p50 %s, p99 %s, max below %s\n", indent, op, lat(h.Mean()), lat(h.Quantile(0.5)), lat(h.Quantile(0.99)), lat(h.Quantile(1)))
		}
	}
}

// lunShown is the document of lun show.
type lunShown struct {
	api.LUN
	Reservation *api.Reservation `json:"reservation,omitempty"` // of its volume; none = nobody is registered
	Stats       []api.LUNStats   `json:"stats"`                 // of each node that serves it and answered
}

func (a *app) lunShowCmd() *cobra.Command {
	show := a.verb("show IQN/LUN [LUN]", "show a LUN, who reserves it, and what was done to it", func(ctx context.Context, args []string) error {
		iqn, n, err := splitLUN(strings.Join(args, "/"))
		if err != nil {
			return err
		}
		l, err := get[api.List[api.LUN]](ctx, a, api.PathLUNs)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(l.Items, func(x api.LUN) bool { return x.Target == iqn && x.LUN == n })
		if i < 0 {
			return api.Errorf(api.CodeNotFound, "clusteradm lun list", "lun show: %s has no LUN %d", iqn, n)
		}
		st, err := get[api.Stats](ctx, a, api.PathStats)
		if err != nil {
			return err
		}
		s := lunShown{LUN: l.Items[i], Stats: []api.LUNStats{}}
		rs, err := get[api.List[api.Reservation]](ctx, a, api.PathReservations)
		if err != nil {
			return err
		}
		if k := slices.IndexFunc(rs.Items, func(r api.Reservation) bool { return r.Volume == s.Volume }); k >= 0 {
			s.Reservation = &rs.Items[k]
		}
		for _, node := range st.Nodes {
			if node.Error != "" {
				fmt.Fprintf(a.Err, "note: %s does not answer: %s\n", clean(node.Node), clean(node.Error))
			}
			for _, x := range node.LUNs {
				if x.Target == iqn && x.LUN == n {
					s.Stats = append(s.Stats, x)
				}
			}
		}
		if a.format == "json" || a.format == "yaml" {
			return a.writeObject(a.Out, "LUN", s)
		}
		v := lunView()
		v.more = func(w io.Writer, _ *app, _ api.LUN) {
			if s.Reservation != nil {
				writeReservation(w, s.Reservation)
			}
			for i := range s.Stats {
				x := &s.Stats[i]
				fmt.Fprintf(w, "\non %s, since its storage worker started, %d sessions:\n", clean(x.Node), x.Sessions)
				writeIO(w, &x.IOStats, "  ")
			}
		}
		return printOne(a, s.LUN, v)
	})
	show.ValidArgsFunction = complete(a, api.PathLUNs, lunName)
	return show
}

func (a *app) sessionShowCmd(v view[api.Session]) *cobra.Command {
	show := a.verb("show NODE TSIH", "show a session: what was negotiated, and what it did", func(ctx context.Context, args []string) error {
		tsih, err := parseTSIH("session show", args[1])
		if err != nil {
			return err
		}
		l, err := get[api.List[api.Session]](ctx, a, api.PathSessions)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(l.Items, func(s api.Session) bool { return s.Node == args[0] && s.TSIH == tsih })
		if i < 0 {
			return api.Errorf(api.CodeNotFound, "clusteradm session list -o wide", "session show: node %s has no session with TSIH %d", args[0], tsih)
		}
		v.more = func(w io.Writer, _ *app, s api.Session) {
			if len(s.Params) > 0 {
				fmt.Fprintln(w, "\nnegotiated:")
				for _, k := range slices.Sorted(maps.Keys(s.Params)) {
					fmt.Fprintf(w, "  %s=%s\n", clean(k), clean(s.Params[k]))
				}
			}
			if s.IO != nil {
				fmt.Fprintln(w, "\ndone:")
				writeIO(w, s.IO, "  ")
				fmt.Fprintf(w, "  PDUs with a wrong digest %d, sent again %d, rejected %d\n", s.DigestErrors, s.Retransmits, s.Rejects)
			}
		}
		return printOne(a, l.Items[i], v)
	})
	show.ValidArgsFunction = complete(a, api.PathNodes, func(n api.Node) string { return n.Name })
	return show
}

func parseTSIH(verb, s string) (uint16, error) {
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil || n == 0 {
		return 0, usagef("clusteradm session list -o wide", "%s: %q is no TSIH: 1 to 65535", verb, s)
	}
	return uint16(n), nil
}

// sessionPath is where a session is killed.
func sessionPath(node string, tsih uint16) string {
	return api.PathSessions + "/" + url.PathEscape(node) + "/" + strconv.Itoa(int(tsih))
}
