package demo

import (
	"fmt"
	"net"
	"strconv"
)

// ports of a node, the same on each of its own address.
type ports struct {
	API    int `json:"api"`
	Raft   int `json:"raft"`
	Gossip int `json:"gossip"`
	ISCSI  int `json:"iscsi"`
}

var defaultPorts = ports{API: 7420, Raft: 7421, Gossip: 7422, ISCSI: 3260}

// place is where the nodes listen: Prefix + ".11" and so on.
type place struct {
	Prefix string `json:"prefix"` // "127.0.0"
	Ports  ports  `json:"ports"`
}

// addr is the address of node i, 0-based.
func (p place) addr(i int) string { return p.Prefix + "." + strconv.Itoa(11+i) }

// free tells whether all addresses can be bound now.
func (p place) free() error {
	for i := range nodeNames {
		for _, port := range []int{p.Ports.API, p.Ports.Raft, p.Ports.Gossip, p.Ports.ISCSI} {
			l, err := net.Listen("tcp4", net.JoinHostPort(p.addr(i), strconv.Itoa(port)))
			if err != nil {
				return err
			}
			_ = l.Close()
		}
		u, err := net.ListenPacket("udp4", net.JoinHostPort(p.addr(i), strconv.Itoa(p.Ports.Gossip)))
		if err != nil {
			return err
		}
		_ = u.Close()
	}
	return nil
}

// choose finds a free place: the documented addresses first, then other
// loopback networks (another demo runs), then other ports (somebody listens on
// all addresses).
func choose() (place, error) {
	var first error
	for _, shift := range []int{0, 10000, 20000, 30000, 40000} {
		p := defaultPorts
		p.API, p.Raft, p.Gossip, p.ISCSI = p.API+shift, p.Raft+shift, p.Gossip+shift, p.ISCSI+shift
		for net := range 32 {
			pl := place{Prefix: fmt.Sprintf("127.0.%d", net), Ports: p}
			err := pl.free()
			if err == nil {
				return pl, nil
			}
			if first == nil {
				first = err
			}
		}
	}
	return place{}, fmt.Errorf("find three free loopback addresses: %w", first)
}
