package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/initiator"
	"github.com/blockhouse-san/blockhouse/node/link"
	"github.com/blockhouse-san/blockhouse/scsi"
	"github.com/blockhouse-san/blockhouse/test/e2e/cluster"
)

// reserver is an initiator port that uses reservations on LUN 1; its name fixes its
// ISID, so that it is the same nexus after a new login.
type reserver struct {
	t      *testing.T
	c      *cluster.Cluster
	portal string
	iqn    string
	name   string
	s      *initiator.Session
}

func newReserver(t *testing.T, c *cluster.Cluster, n *cluster.Node, name string) *reserver {
	t.Helper()
	r := &reserver{t: t, c: c, portal: n.IP + ":3260", iqn: "iqn.2026-11.io.blockhouse:demo.disks", name: "iqn.2026-11.test:" + name}
	t.Cleanup(func() {
		if r.s != nil {
			_ = r.s.Close()
		}
	})
	r.login()
	return r
}

// login logs in, again if there was a session, and takes what a login is told.
func (r *reserver) login() {
	r.t.Helper()
	if r.s != nil {
		_ = r.s.Close()
	}
	r.c.Wait("a login of "+r.name, 30*time.Second, func() (bool, string) {
		ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
		defer cancel()
		s, err := initiator.Login(ctx, r.portal, r.iqn, initiator.Config{InitiatorName: r.name})
		r.s = s
		return err == nil, fmt.Sprint(err)
	})
	// A worker that has just started shows the LUN when its epoch is committed.
	r.c.Wait("the LUN is ready for "+r.name, 20*time.Second, func() (bool, string) {
		res, err := r.exec(scsi.TestUnitReady(), nil, nil)
		if err != nil { // the gate was still opening
			ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Second)
			defer cancel()
			_ = r.s.Close()
			if s, e := initiator.Login(ctx, r.portal, r.iqn, initiator.Config{InitiatorName: r.name}); e == nil {
				r.s = s
			}
			return false, err.Error()
		}
		return res.Status != scsi.StatusCheckCondition, fmt.Sprint(res.Err())
	})
}

func (r *reserver) exec(cdb scsi.CDB, out, in []byte) (initiator.Result, error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	dir := scsi.DirNone
	switch {
	case out != nil:
		dir = scsi.DirOut
	case in != nil:
		dir = scsi.DirIn
	}
	return r.s.Exec(ctx, 1, cdb.Bytes(), dir, out, in)
}

func (r *reserver) pout(sa int, typ scsi.PRType, p scsi.PROut) (initiator.Result, error) {
	list := p.Bytes(sa)
	cdb, err := scsi.PersistentReserveOut(sa, typ, uint32(len(list)))
	if err != nil {
		r.t.Fatal(err)
	}
	return r.exec(cdb, list, nil)
}

func (r *reserver) write() (initiator.Result, error) {
	return r.exec(scsi.Write(0, 1, false), make([]byte, 512), nil)
}

// want checks a status; text is of the sense, with CHECK CONDITION.
func (r *reserver) want(what string, st scsi.Status, text string) func(initiator.Result, error) {
	return func(res initiator.Result, err error) {
		r.t.Helper()
		if err != nil {
			r.t.Fatalf("%s by %s: %v", what, r.name, err)
		}
		if e := res.Err(); res.Status != st || text != "" && (e == nil || !strings.Contains(e.Error(), text)) {
			r.t.Fatalf("%s by %s: %v %v, want %v %s", what, r.name, res.Status, e, st, text)
		}
	}
}

// keys reads PRGENERATION and the registered keys, and the reservation.
func (r *reserver) keys() (gen uint32, keys []uint64, holder uint64, typ scsi.PRType) {
	r.t.Helper()
	in := make([]byte, 4096)
	get := func(sa int) []byte {
		cdb, err := scsi.PersistentReserveIn(sa, uint16(len(in)))
		if err != nil {
			r.t.Fatal(err)
		}
		res, err := r.exec(cdb, nil, in)
		if err == nil {
			err = res.Err()
		}
		if err != nil {
			r.t.Fatalf("PERSISTENT RESERVE IN by %s: %v", r.name, err)
		}
		return in[:res.N]
	}
	gen, keys, err := scsi.ParseReadKeys(get(scsi.SAReadKeys))
	if err != nil {
		r.t.Fatal(err)
	}
	if _, holder, typ, err = scsi.ParseReadReservation(get(scsi.SAReadReservation)); err != nil {
		r.t.Fatal(err)
	}
	return gen, keys, holder, typ
}

func killWorker(t *testing.T, n *cluster.Node) {
	t.Helper()
	p, err := n.Worker(link.Storage)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// TestReservations: they are facts of the cluster. A worker that is killed enforces
// them from the first login on, whatever APTPL said; RESERVE ends with its nexus;
// the other nexuses are told once; people see who holds what.
func TestReservations(t *testing.T) {
	c := cluster.New(t, 3).Up()
	n3 := c.Node("n3")
	lun(t, c, "n3", 16<<20)
	a, b := newReserver(t, c, n3, "a"), newReserver(t, c, n3, "b")
	a.want("register", scsi.StatusGood, "")(a.pout(scsi.SARegister, 0, scsi.PROut{NewKey: 0xA}))
	a.want("reserve", scsi.StatusGood, "")(a.pout(scsi.SAReserve, scsi.PRWriteExclusiveRegOnly, scsi.PROut{Key: 0xA}))
	b.want("write", scsi.StatusReservationConflict, "")(b.write())
	for round := range 2 {
		killWorker(t, n3)
		b.login()
		b.want("write after the worker was killed", scsi.StatusReservationConflict, "")(b.write())
		a.login()
		a.want("write after the worker was killed", scsi.StatusGood, "")(a.write())
		if gen, keys, holder, typ := a.keys(); gen != uint32(1+round) || len(keys) != 1 || keys[0] != 0xA || holder != 0xA || typ != scsi.PRWriteExclusiveRegOnly {
			t.Fatalf("after the kill: generation %d, keys %x, holder %x, type %v", gen, keys, holder, typ)
		}
		// The second round with APTPL=1.
		a.want("register with APTPL", scsi.StatusGood, "")(a.pout(scsi.SARegister, 0, scsi.PROut{Key: 0xA, NewKey: 0xA, APTPL: true}))
	}
	// The other is told of what concerns it, once.
	b.want("register", scsi.StatusGood, "")(b.pout(scsi.SARegister, 0, scsi.PROut{NewKey: 0xB}))
	b.want("write of a registrant", scsi.StatusGood, "")(b.write())
	a.want("preempt and abort", scsi.StatusGood, "")(a.pout(scsi.SAPreemptAndAbort, scsi.PRWriteExclusiveRegOnly, scsi.PROut{Key: 0xA, NewKey: 0xB}))
	b.want("told", scsi.StatusCheckCondition, "2a/05")(b.exec(scsi.TestUnitReady(), nil, nil))
	b.want("told once", scsi.StatusGood, "")(b.exec(scsi.TestUnitReady(), nil, nil))
	b.want("write after the preemption", scsi.StatusReservationConflict, "")(b.write())

	l, err := api.Get[api.List[api.Reservation]](t.Context(), c.Nodes[0].API(), api.PathReservations)
	if err != nil || len(l.Items) != 1 {
		t.Fatalf("%+v %v", l, err)
	}
	if r := l.Items[0]; r.Volume != "v1" || !strings.HasPrefix(r.Holder, a.name+",i,0x") || r.Type != scsi.PRWriteExclusiveRegOnly.String() || r.Generation != 5 ||
		len(r.Registrations) != 1 || r.Registrations[0].Key != "0x000000000000000a" || r.Registrations[0].Initiator != a.name || !r.Registrations[0].Holder {
		t.Errorf("%s", cluster.JSON(r))
	}
	events := reservationEvents(t, c.Leader())
	if len(events) != 6 || events[0]["action"] != "register" || events[5]["action"] != "preempt-and-abort" {
		t.Errorf("events: %v", events)
	}

	// RESERVE is the nexus': it goes with the worker that knew it.
	a.want("clear", scsi.StatusGood, "")(a.pout(scsi.SAClear, 0, scsi.PROut{Key: 0xA}))
	six := func(op scsi.Opcode) scsi.CDB {
		cdb, err := scsi.Build(op, scsi.NoSA)
		if err != nil {
			t.Fatal(err)
		}
		return cdb
	}
	b.want("RESERVE(6)", scsi.StatusGood, "")(b.exec(six(scsi.OpReserve6), nil, nil))
	a.want("write under RESERVE", scsi.StatusReservationConflict, "")(a.write())
	if err := b.s.Close(); err != nil {
		t.Error(err)
	}
	a.want("write after the logout", scsi.StatusGood, "")(a.write())
	b.login()
	b.want("RESERVE(6)", scsi.StatusGood, "")(b.exec(six(scsi.OpReserve6), nil, nil))
	killWorker(t, n3)
	_ = b.s.Close()
	a.login()
	c.Wait("the RESERVE of a lost nexus ends", 20*time.Second, func() (bool, string) {
		res, err := a.write()
		if err != nil {
			a.login()
		}
		return err == nil && res.Status == scsi.StatusGood, fmt.Sprint(res.Status, err)
	})
}

func reservationEvents(t *testing.T, n *cluster.Node) (out []map[string]any) {
	t.Helper()
	t.Helper()
	if err := n.API().RecentEvents(t.Context(), func(e api.Event) error {
		if e.Kind == "reservation.changed" {
			out = append(out, e.Data)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

// TestReservationDecidedOnce: the leader dies between the commit and the answer;
// controls are restarted while requests are under way; leases end. Each request is
// applied once or not at all, and the answer says which. A history of one initiator:
// each REGISTER AND IGNORE adds one to PRGENERATION, and to nothing else.
func TestReservationDecidedOnce(t *testing.T) {
	c := cluster.New(t, 3)
	n1, n3 := c.Node("n1"), c.Node("n3")
	n1.Env = []string{"BLOCKHOUSE_CRASH=reserve-decided"}
	c.Up()
	lun(t, c, "n3", 16<<20)
	a := newReserver(t, c, n3, "a")
	if c.Leader() != n1 {
		t.Fatalf("%s leads, not the founder", c.Leader().Name)
	}
	var key uint64
	var gen uint32
	var good, refused, unknown int
	type answer struct {
		res initiator.Result
		err error
	}
	// send registers the next key.
	send := func() chan answer {
		key++
		p := scsi.PROut{NewKey: key}
		out := make(chan answer, 1)
		go func() {
			res, err := a.pout(scsi.SARegisterAndIgnoreKey, 0, p)
			out <- answer{res, err}
		}()
		return out
	}
	// check says whether the answer is the truth.
	check := func(when string, x answer) initiator.Result {
		t.Helper()
		res, err := x.res, x.err
		if err != nil {
			a.login()
		}
		now, keys, _, _ := a.keys()
		applied := len(keys) == 1 && keys[0] == key
		switch {
		case err != nil:
			unknown++
			if now != gen && (now != gen+1 || !applied) {
				t.Fatalf("%s: unanswered (%v), generation %d became %d, keys %d", when, err, gen, now, keys)
			}
		case res.Status == scsi.StatusGood:
			good++
			if now != gen+1 || !applied {
				t.Fatalf("%s: GOOD for key %d, generation %d became %d, keys %d", when, key, gen, now, keys)
			}
		default:
			refused++
			var se *scsi.Sense
			if !errors.As(res.Err(), &se) || se.Code != scsi.ASCTransition {
				t.Fatalf("%s: %v", when, res.Err())
			}
			if now != gen {
				t.Fatalf("%s: %v, and generation %d became %d", when, res.Err(), gen, now)
			}
		}
		gen = now
		return res
	}
	// The leader commits and dies.
	if res := check("the leader dies at the commit", <-send()); res.Status != scsi.StatusGood && unknown == 0 {
		t.Errorf("%v", res.Err())
	}
	select {
	case <-n1.Proc().Done():
	case <-time.After(10 * time.Second):
		t.Fatal("the leader lives: the point was not reached")
	}
	n1.Env = nil
	n1.Start()
	for i := range 3 {
		c.Wait("n3 serves", 30*time.Second, func() (bool, string) {
			r, err := n3.Report(link.Storage)
			return err == nil && r.Gate == "serving", r.Gate
		})
		l := c.Leader()
		kill := time.After(time.Duration(3+7*i) * time.Millisecond)
		for killed := false; !killed; {
			out := send()
			var x answer
			select {
			case x = <-out:
			case <-kill:
				l.KillControl()
				l.Start()
				killed = true
				x = <-out
			}
			check(fmt.Sprintf("round %d: %s is killed", i, l.Name), x)
		}
	}
	// The control of the target's node comes back while a request waits for it.
	c.Wait("n3 serves", 30*time.Second, func() (bool, string) {
		r, err := n3.Report(link.Storage)
		return err == nil && r.Gate == "serving", r.Gate
	})
	n3.KillControl()
	out := send()
	n3.Start()
	check("control is restarted", <-out)
	c.Wait("n3 serves", 30*time.Second, func() (bool, string) {
		r, err := n3.Report(link.Storage)
		return err == nil && r.Gate == "serving", r.Gate
	})
	if res := check("all is well", <-send()); res.Status != scsi.StatusGood {
		t.Errorf("%v", res.Err())
	}
	// Without control no request is ever GOOD; writes go on (SAFETY §2).
	seen := strings.Count(n3.Logs(), "control connection ended")
	n3.KillControl()
	// Before the worker knows, it cannot tell what became of a request.
	c.Wait("the worker notices", 10*time.Second, func() (bool, string) { return strings.Count(n3.Logs(), "control connection ended") > seen, "" })
	last := <-send()
	var se *scsi.Sense
	if last.err != nil || !errors.As(last.res.Err(), &se) || se.Code != scsi.ASCTransition {
		t.Errorf("without control: %v, %v", last.err, last.res.Err())
	}
	a.want("write without control", scsi.StatusGood, "")(a.write())
	n3.Start()
	c.Wait("n3 serves", 30*time.Second, func() (bool, string) {
		r, err := n3.Report(link.Storage)
		return err == nil && r.Gate == "serving", r.Gate
	})
	if now, keys, _, _ := a.keys(); now != gen || len(keys) != 1 {
		t.Errorf("the request that was refused: generation %d became %d, keys %d", gen, now, keys)
	}
	t.Logf("PROOF reservations: %d requests GOOD, %d refused, %d unanswered, each applied once or not at all", good, refused, unknown)
}
