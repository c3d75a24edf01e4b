package cman

import (
	"fmt"
	"html"
	"strconv"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/version"
)

const clustatUsage = `usage: clustat <options>
    -i <interval>      Refresh every <interval> seconds.  May not be used
                       with -x.
    -I                 Display local node ID and exit
    -m <member>        Display status of <member> and exit
    -s <service>       Display status of <service> and exit
    -v                 Display version and exit
    -x                 Dump information as XML
    -Q                 Return 0 if quorate, 1 if not (no output)
    -f                 Enable fast clustat reports
    -l                 Use long format for services

`

// notFound is clustat's exit status for an unknown member or service: -1.
const notFound = 255

// clustat is clustat(8). There is no table of services as long as none runs: so
// does the original where rgmanager is not started.
func (a *App) clustat(args []string) int {
	opts, err := getopt(a.name, "fIls:m:i:xvQh?", args)
	if err != nil {
		fmt.Fprintln(a.Err, err)
		fmt.Fprint(a.Out, clustatUsage)
		return 0 // the original's answer to '?'
	}
	var member, service string
	var xml, quorum, id bool
	every := time.Duration(0)
	for _, o := range opts {
		switch o.letter {
		case 'v':
			fmt.Fprintf(a.Out, "clustat version %s\n", version.String())
			return 0
		case 'I':
			id = true
		case 'Q':
			quorum = true
		case 'm':
			member = o.arg
		case 's':
			service = o.arg
		case 'i':
			n, _ := strconv.Atoi(o.arg)
			every = time.Duration(max(n, 1)) * time.Second
		case 'x':
			if every > 0 {
				fmt.Fprint(a.Out, "Error: Options '-i' and '-x' are mutually exclusive\n")
				return 1
			}
			xml = true
		case 'h', '?':
			fmt.Fprint(a.Out, clustatUsage)
			return 0
		}
	}
	for {
		c, err := a.cluster()
		if err == nil && c.Health == api.HealthUninit {
			err = api.Errorf(api.CodeUnreachable, "clusteradm join TOKEN@HOST:PORT", "this host is in no cluster")
		}
		if err != nil {
			e := api.AsError(err)
			fmt.Fprintf(a.Err, "Could not connect to CMAN: %s\n", e.Message)
			if e.Next != "" && !quorum {
				fmt.Fprintf(a.Err, "next: %s\n", e.Next)
			}
			return 1
		}
		switch {
		case quorum:
			return 1 - b2i(c.Quorum.Quorate)
		case id:
			fmt.Fprintf(a.Out, "0x%08x\n", c.self().Index)
			return 0
		}
		if every > 0 {
			fmt.Fprint(a.Out, "\x1b[H\x1b[2J")
		}
		var st int
		if xml {
			st = a.clustatXML(c, member, service)
		} else {
			st = a.clustatText(c, member, service)
		}
		if every == 0 {
			return st
		}
		t := time.NewTimer(every)
		select {
		case <-t.C:
		case <-a.ctx.Done():
			t.Stop()
			return st
		}
	}
}

// width is the width of clustat's first column: half the terminal, 40 without one.
func (a *App) width() int {
	if a.Columns > 0 {
		return min(a.Columns/2, 64) // MAXHOSTNAMELEN
	}
	return 40
}

func (a *App) clustatText(c cluster, member, service string) int {
	if service == "" && member == "" {
		fmt.Fprintf(a.Out, "Cluster Status for %s @ %s\n", clean(c.Cluster), a.Now().In(a.Zone).Format("Mon Jan _2 15:04:05 2006"))
		word := "Inquorate"
		if c.Quorum.Quorate {
			word = "Quorate"
		}
		fmt.Fprintf(a.Out, "Member Status: %s\n\n", word)
	}
	if service != "" {
		return a.noService(service)
	}
	w := a.width()
	head := func() {
		for _, l := range [][3]string{{"Member Name", "ID", "Status"}, {"------ ----", "----", "------"}} {
			fmt.Fprintf(a.Out, " %-*.*s%-4.4s %s\n", w, w, l[0], l[1], l[2])
		}
	}
	if member == "" {
		head()
	}
	for _, n := range c.Nodes {
		if member != "" && n.Name != member {
			continue
		}
		if member != "" {
			head()
		}
		status := "Offline"
		if c.member(n) {
			status = "Online"
		}
		if n.Name == c.Self {
			status += ", Local"
		}
		fmt.Fprintf(a.Out, " %-*.*s %4d %s\n", w, w, clean(n.Name), n.Index, status)
		if member != "" {
			return 1 - b2i(c.member(n))
		}
	}
	if member != "" {
		return notFound
	}
	fmt.Fprintln(a.Out)
	return 0
}

func (a *App) noService(service string) int {
	if !strings.Contains(service, ":") {
		service = "service:" + service
	}
	a.refuse("clusteradm status", "there is no service %s: this cluster runs none", clean(service))
	return notFound
}

func (a *App) clustatXML(c cluster, member, service string) int {
	esc := func(s string) string { return html.EscapeString(clean(s)) }
	fmt.Fprint(a.Out, "<?xml version=\"1.0\"?>\n<clustat version=\"4.1.1\">\n")
	st := 0
	if member == "" && service == "" {
		fmt.Fprintf(a.Out, "  <cluster name=\"%s\" id=\"%d\" generation=\"%d\"/>\n", esc(c.Cluster), clusterID(c.Cluster), c.View)
		// The line break inside the tag is the original's.
		q := "quorate=\"0\"\n"
		if c.Quorum.Quorate {
			q = "quorate=\"1\""
		}
		fmt.Fprintf(a.Out, "  <quorum %s groupmember=\"0\"/>\n", q)
	}
	if service == "" {
		if member != "" {
			st = notFound
		}
		fmt.Fprint(a.Out, "  <nodes>\n")
		for _, n := range c.Nodes {
			if member != "" && n.Name != member {
				continue
			}
			if member != "" {
				st = 1 - b2i(c.member(n))
			}
			fmt.Fprintf(a.Out, "    <node name=\"%s\" state=\"%d\" local=\"%d\" estranged=\"0\" rgmanager=\"0\" rgmanager_master=\"0\" qdisk=\"0\" nodeid=\"0x%08x\"/>\n",
				esc(n.Name), b2i(c.member(n)), b2i(n.Name == c.Self), n.Index)
		}
		fmt.Fprint(a.Out, "  </nodes>\n")
	}
	fmt.Fprint(a.Out, "</clustat>\n")
	if service != "" {
		return a.noService(service)
	}
	return st
}
