package target

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/blockhouse-san/blockhouse/block"
	"github.com/blockhouse-san/blockhouse/iscsi"
	"github.com/blockhouse-san/blockhouse/scsi"
)

// jitter is a store that takes now and then a little longer, so that commands run on
// readers, on the pool, and on readers that lose their role.
type jitter struct{ block.Device }

func (j jitter) wait() {
	switch rand.IntN(12) {
	case 0:
		time.Sleep(50 * time.Microsecond)
	case 1:
		time.Sleep(inlineLimit + time.Millisecond)
	}
}

func (j jitter) ReadAt(ctx context.Context, p []byte, off int64) error {
	j.wait()
	return j.Device.ReadAt(ctx, p, off)
}

func (j jitter) WriteAt(ctx context.Context, p []byte, off int64, f block.Flags) error {
	j.wait()
	return j.Device.WriteAt(ctx, p, off, f)
}

// step is a command of one block, or the loss of a connection.
type step struct {
	conn  int
	block uint64
	write bool
	drop  bool // of the connection, when it is this command's turn to be sent
	p     *iscsi.ScsiCommand
	value byte // that it writes
	sent  bool
	done  bool // GOOD came
	read  byte
}

// Whatever connections commands go over, in whatever order they arrive, and whatever
// connection is lost on the way: overlapping commands take effect in the order of
// CmdSN, each once, and those of a lost connection at their place or not at all.
func TestOrderProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(r *rapid.T) {
		conns := rapid.IntRange(1, 4).Draw(r, "connections")
		level := rapid.IntRange(0, 1).Draw(r, "level")
		n := rapid.IntRange(1, 40).Draw(r, "commands")
		steps := make([]*step, n)
		queue := make([][]*step, conns)
		for i := range steps {
			s := &step{conn: rapid.IntRange(0, conns-1).Draw(r, "conn"), block: uint64(rapid.IntRange(0, 2).Draw(r, "block")),
				write: rapid.Bool().Draw(r, "write"), value: byte(i + 1)}
			s.drop = s.conn > 0 && rapid.IntRange(0, 19).Draw(r, "drop") == 0
			steps[i] = s
			queue[s.conn] = append(queue[s.conn], s)
		}
		l := lunOf(t, 0)
		l.Device = jitter{l.Device}
		srv, err := New(Options{NopInterval: -1})
		if err != nil {
			t.Fatal(err)
		}
		defer srv.Close()
		b := &bench{t: t, srv: srv, conf: Config{Targets: []Target{{IQN: testIQN, TPGT: 1, RelPort: 1, Portals: []netip.AddrPort{anyPort}, ACL: ACL{Open: true}, LUNs: []LUN{l}}}}}
		b.apply()
		m := b.multi(conns, loginOpt{keys: kv(fmt.Sprintf("ErrorRecoveryLevel=%d", level))})
		for _, s := range steps {
			if s.write {
				s.p = m.command(s.conn, scsi.Write(s.block, 1, false), make([]byte, 512), 0)
			} else {
				s.p = m.command(s.conn, scsi.Read(s.block, 1), nil, 512)
			}
		}
		var mu sync.Mutex
		byTag := map[uint32]*step{}
		for _, s := range steps {
			byTag[s.p.ITT] = s
		}
		aborted := make(chan struct{}, n)
		var left sync.WaitGroup // commands not answered
		left.Add(n)
		var once = make(map[*step]bool)
		end := func(s *step) { // with mu
			if !once[s] {
				once[s] = true
				left.Done()
			}
		}
		var readers sync.WaitGroup
		write := make([]sync.Mutex, conns)
		for i, c := range m.c {
			readers.Go(func() {
				got := map[uint32]byte{}
				for {
					bh, d, err := c.recv()
					if err != nil {
						return
					}
					mu.Lock()
					s := byTag[bh.ITT()]
					switch bh.Opcode() {
					case iscsi.OpDataIn:
						got[bh.ITT()] = d[0]
						if bh[1]&1 == 0 {
							break
						}
						fallthrough
					case iscsi.OpScsiResponse:
						if st := bh[3]; s == nil || s.done || st != 0 {
							r.Errorf("an answer that nobody waits for, or status %d: %+v", st, s)
							break
						}
						s.done, s.read = true, got[bh.ITT()]
						end(s)
					case iscsi.OpNopIn: // task management waits for our acknowledgement
						var ping iscsi.NopIn
						if err := ping.Decode(bh); err != nil {
							r.Errorf("%v", err)
						}
						write[i].Lock()
						_ = c.trySend(&iscsi.NopOut{Immediate: true, ITT: iscsi.ReservedTag, TTT: ping.TTT, ExpStatSN: c.expSN})
						write[i].Unlock()
					case iscsi.OpTaskMgmtResp:
						aborted <- struct{}{}
					}
					mu.Unlock()
				}
			})
		}
		// What is sent when: each connection keeps its order, else any.
		gone := make([]bool, conns)
		for {
			var open []int
			for i := range queue {
				if len(queue[i]) > 0 {
					open = append(open, i)
				}
			}
			if len(open) == 0 {
				break
			}
			i := rapid.SampledFrom(open).Draw(r, "next")
			s := queue[i][0]
			queue[i] = queue[i][1:]
			if gone[i] {
				continue
			}
			if s.drop {
				gone[i] = true
				_ = m.c[i].nc.Close()
				cid := uint16(i + 1)
				waitFor(t, func() bool {
					for _, c := range srv.Sessions()[0].Conns {
						if c.CID == cid {
							return false
						}
					}
					return true
				})
				for _, x := range steps { // no gap may stay
					mu.Lock()
					lost := x.conn == i && !x.done
					mu.Unlock()
					if lost {
						m.itt++
						write[0].Lock()
						m.c[0].send(&iscsi.TaskMgmtRequest{Immediate: true, Function: iscsi.FuncAbortTask, ITT: m.itt, RefTag: x.p.ITT, CmdSN: m.cmdSN, RefCmdSN: x.p.CmdSN})
						write[0].Unlock()
						<-aborted
						mu.Lock()
						end(x)
						mu.Unlock()
					}
				}
				continue
			}
			var data []byte
			if s.write {
				data = make([]byte, 512)
				data[0] = s.value
			}
			s.sent = true
			s.p.ExpStatSN = 0
			write[i].Lock()
			m.c[i].send(s.p, data)
			write[i].Unlock()
		}
		left.Wait()
		for _, c := range m.c {
			_ = c.nc.Close()
		}
		readers.Wait()
		waitFor(t, func() bool { return len(srv.Sessions()) == 0 })
		// The model: what each block may hold.
		may := [3]map[byte]bool{{0: true}, {0: true}, {0: true}}
		for i, s := range steps {
			at := &may[s.block]
			switch {
			case s.write && s.done:
				*at = map[byte]bool{s.value: true}
			case s.write && s.sent:
				(*at)[s.value] = true
			case s.done:
				if !(*at)[s.read] {
					r.Fatalf("command %d reads %d of block %d, it may hold %v", i, s.read, s.block, *at)
				}
				*at = map[byte]bool{s.read: true}
			}
		}
		p := make([]byte, 512)
		for i := range may {
			if err := l.Device.ReadAt(context.Background(), p, int64(i)*512); err != nil || !may[i][p[0]] {
				r.Fatalf("block %d holds %d at the end (%v), it may hold %v", i, p[0], err, may[i])
			}
		}
	})
}
