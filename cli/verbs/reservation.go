package verbs

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/blockhouse-san/blockhouse/api"
)

// writeReservation prints who holds and who is registered, for lun show.
func writeReservation(w io.Writer, r *api.Reservation) {
	switch {
	case r.ReservedBy != "":
		fmt.Fprintf(w, "\nreserved (RESERVE) by %s\n", clean(r.ReservedBy))
	case r.Type != "":
		fmt.Fprintf(w, "\nreserved (%s) by %s\n", r.Type, clean(r.Holder))
	default:
		fmt.Fprintf(w, "\nnot reserved\n")
	}
	for _, g := range r.Registrations {
		port := fmt.Sprintf("port %d", g.TargetPort)
		if g.AllPorts {
			port = "every port"
		}
		fmt.Fprintf(w, "  registered: %s through %s, key %s\n", clean(g.Port), port, g.Key)
	}
}

func (a *app) reservationCmd() *cobra.Command {
	each := func(r api.Reservation, f func(api.Registration) string) string {
		var out []string
		for _, g := range r.Registrations {
			if s := f(g); !slices.Contains(out, s) {
				out = append(out, s)
			}
		}
		return join(out)
	}
	v := view[api.Reservation]{
		kind: "Reservation",
		name: func(r api.Reservation) string { return r.Volume },
		cols: []col[api.Reservation]{
			{head: "VOLUME", cell: func(r api.Reservation) string { return r.Volume }},
			{head: "TYPE", cell: func(r api.Reservation) string {
				if r.ReservedBy != "" {
					return "RESERVE"
				}
				return dash(r.Type)
			}},
			{head: "HOLDER", cell: func(r api.Reservation) string {
				if r.ReservedBy != "" {
					return r.ReservedBy
				}
				return dash(r.Holder)
			}},
			{head: "REGISTERED", cell: func(r api.Reservation) string { return each(r, func(g api.Registration) string { return g.Initiator }) }},
			{head: "KEYS", wide: true, cell: func(r api.Reservation) string { return each(r, func(g api.Registration) string { return g.Key }) }},
			{head: "GENERATION", wide: true, right: true, cell: func(r api.Reservation) string { return strconv.FormatUint(uint64(r.Generation), 10) }},
		},
	}
	list := a.verb("list", "list who is registered on a volume and who reserves it", func(ctx context.Context, _ []string) error {
		l, err := get[api.List[api.Reservation]](ctx, a, api.PathReservations)
		if err != nil {
			return err
		}
		return printList(a, l, v)
	})
	list.Long = `List the reservations of volumes: who is registered (PERSISTENT RESERVE), who holds
which type, and who holds a RESERVE. The cluster keeps them: they survive restarts
and are the same on every node.`
	return a.group(&cobra.Command{Use: "reservation", Short: "SCSI reservations of volumes"}, alias(list, "ls"))
}
