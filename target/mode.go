package target

import (
	"bytes"
	"errors"
	"sync"
	"sync/atomic"

	"github.com/blockhouse-san/blockhouse/scsi"
)

// modePage is a page with its three value sets. Bodies have equal lengths.
type modePage struct {
	page, sub               uint8
	current, mask, defaults []byte
}

// modeState is the mode pages of a logical unit, shared by all initiators.
type modeState struct {
	mu    sync.RWMutex
	pages []modePage
	cache bool // the store has a write cache
	thin  bool
	armed atomic.Bool // a threshold is enabled
}

// Bits of pages (SPC-4 7.5, SBC-3 6.5), as offsets into the body.
const (
	cachingWCE     = 0x04 // byte 0
	controlDSense  = 0x04 // byte 0
	controlQErr    = 0x06 // byte 1: 00b none, 01b the task set, 11b the nexus
	controlSWP     = 0x08 // byte 2
	errorRecovery0 = 0xC0 // AWRE, ARRE
)

func (m *modeState) init(writeCache, thin bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.cache, m.thin = writeCache, thin
	caching := make([]byte, 18)
	if writeCache {
		caching[0] = cachingWCE
	}
	cmask := make([]byte, 18)
	cmask[0] = cachingWCE
	control := make([]byte, 10)
	control[1] = 0x10 // unrestricted reordering
	kmask := make([]byte, 10)
	kmask[0] = controlDSense
	kmask[1] = controlQErr
	kmask[2] = controlSWP
	recovery := make([]byte, 10)
	recovery[0] = errorRecovery0
	none := func(n int) []byte { return make([]byte, n) }
	m.pages = []modePage{
		{scsi.ModeErrorRecovery, 0, bytes.Clone(recovery), none(10), recovery},
		{scsi.ModeDisconnect, 0, none(14), none(14), none(14)},
		{scsi.ModeCaching, 0, bytes.Clone(caching), cmask, caching},
		{scsi.ModeControl, 0, bytes.Clone(control), kmask, control},
		{scsi.ModeControl, scsi.SubpageControlExt, none(28), none(28), none(28)},
		{scsi.ModeInfoExceptions, 0, none(10), none(10), none(10)},
	}
	if thin {
		m.pages = append(m.pages, thresholdPage())
	}
	m.arm()
}

// reset restores the defaults at a logical unit reset.
func (m *modeState) reset() {
	m.mu.RLock()
	c, thin := m.cache, m.thin
	m.mu.RUnlock()
	m.init(c, thin)
}

func (m *modeState) bit(page uint8, at int, bit byte) bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for i := range m.pages {
		if p := &m.pages[i]; p.page == page && p.sub == 0 {
			return p.current[at]&bit != 0
		}
	}
	return false
}

func (m *modeState) writeCache() bool      { return m.bit(scsi.ModeCaching, 0, cachingWCE) }
func (m *modeState) descriptorSense() bool { return m.bit(scsi.ModeControl, 0, controlDSense) }
func (m *modeState) writeProtected() bool  { return m.bit(scsi.ModeControl, 2, controlSWP) }

// queueErrors is the QERR field.
func (m *modeState) queueErrors() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for i := range m.pages {
		if p := &m.pages[i]; p.page == scsi.ModeControl && p.sub == 0 {
			return int(p.current[1]&controlQErr) >> 1
		}
	}
	return 0
}

func checkModeSense(t *task) *scsi.Sense {
	if t.cdb.Get(scsi.FPC) == scsi.ModeSaved {
		return scsi.Check(scsi.IllegalRequest, scsi.ASCSavingNotSupported)
	}
	if len(t.lu.mode.sense(uint8(t.cdb.Get(scsi.FPage)), uint8(t.cdb.Get(scsi.FSubpage)), 0)) == 0 {
		if t.lu.mode.knows(uint8(t.cdb.Get(scsi.FPage))) {
			return scsi.InvalidField(&t.cdb, scsi.FSubpage)
		}
		return scsi.InvalidField(&t.cdb, scsi.FPage)
	}
	return nil
}

func (m *modeState) knows(page uint8) bool {
	for _, p := range m.pages {
		if p.page == page {
			return true
		}
	}
	return page == scsi.ModeAllPages
}

// sense selects pages; none means that page or subpage is unknown.
func (m *modeState) sense(page, sub uint8, pc uint64) (out []scsi.ModePage) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, p := range m.pages {
		if page != scsi.ModeAllPages && p.page != page {
			continue
		}
		if sub != p.sub && sub != scsi.SubpageAll {
			continue
		}
		b := p.current
		switch pc {
		case scsi.ModeChangeable:
			b = p.mask
		case scsi.ModeDefault:
			b = p.defaults
		}
		out = append(out, scsi.ModePage{Page: p.page, Subpage: p.sub, Body: bytes.Clone(b)})
	}
	return out
}

func runModeSense(x *exec) error {
	m := scsi.ModeData{
		WriteProtect: x.ent.readOnly || x.lu.mode.writeProtected() || x.lu.dev.Info().Caps.ReadOnly,
		DPOFUA:       true,
		Pages:        x.lu.mode.sense(uint8(x.cdb.Get(scsi.FPage)), uint8(x.cdb.Get(scsi.FSubpage)), x.cdb.Get(scsi.FPC)),
	}
	if !x.cdb.Is(scsi.FDBD) {
		m.HasBlock, m.Blocks, m.BlockSize = true, x.lu.blocks(), uint32(x.lu.blockSize())
		m.LongLBA = x.cdb.Is(scsi.FLLBAA)
	}
	if x.cdb.Cmd.Op == scsi.OpModeSense10 {
		x.reply(m.Bytes10())
		return nil
	}
	b, err := m.Bytes6()
	if err != nil {
		return scsi.InvalidField(&x.cdb, scsi.FPage)
	}
	x.reply(b)
	return nil
}

func checkModeSelect(t *task) *scsi.Sense {
	switch {
	case t.cdb.Is(scsi.FSP):
		return scsi.Check(scsi.IllegalRequest, scsi.ASCSavingNotSupported)
	case t.cdb.Is(scsi.FRTD):
		return scsi.InvalidField(&t.cdb, scsi.FRTD)
	case !t.cdb.Is(scsi.FPF) && t.cdb.Get(scsi.FParamLen) > 0:
		return scsi.InvalidField(&t.cdb, scsi.FPF)
	}
	return nil
}

func runModeSelect(x *exec) error {
	b, err := x.params()
	if err != nil || len(b) == 0 {
		return err
	}
	long := x.cdb.Cmd.Op == scsi.OpModeSelect10
	m, at, err := scsi.ParseMode(b, long)
	var me *scsi.ModeError
	switch {
	case errors.As(err, &me) && me.Short:
		return scsi.Check(scsi.IllegalRequest, scsi.ASCParamListLength)
	case errors.As(err, &me):
		return scsi.InvalidParam(me.Byte, -1)
	}
	if m.HasBlock {
		head := 4
		if long {
			head = 8
		}
		blocks := x.lu.blocks()
		switch {
		case m.BlockSize != uint32(x.lu.blockSize()):
			return scsi.InvalidParam(head+4, -1)
		case m.Blocks != 0 && m.Blocks != blocks && !(m.Blocks == 0xFFFFFFFF && blocks > m.Blocks):
			return scsi.InvalidParam(head, -1)
		}
	}
	changed, err := x.lu.mode.choose(m.Pages, at)
	if err != nil || !changed {
		return err
	}
	for _, s := range x.s.srv.list() { // UA to every other nexus
		if s != x.s && s.tgt != nil && s.tgt.has(x.lu) {
			s.attend(x.lu, scsi.ASCModeChanged)
		}
	}
	// Without a write cache everything acknowledged so far has to be durable.
	if !x.lu.mode.writeCache() {
		if err := x.lu.dev.Flush(x.ctx); err != nil {
			return x.fail("flush", err)
		}
	}
	return nil
}

// choose takes new values: all of them or, on an error, none.
func (m *modeState) choose(ps []scsi.ModePage, at []int) (changed bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := make([][]byte, len(m.pages))
	for k, p := range ps {
		i := -1
		for j := range m.pages {
			if m.pages[j].page == p.Page && m.pages[j].sub == p.Subpage {
				i = j
			}
		}
		if i < 0 {
			return false, scsi.InvalidParam(at[k], 5)
		}
		mine := &m.pages[i]
		head := 2
		if p.Subpage != 0 {
			head = 4
		}
		if len(p.Body) != len(mine.current) {
			return false, scsi.InvalidParam(at[k]+head-1, -1)
		}
		for j, v := range p.Body {
			if d := (v ^ mine.current[j]) &^ mine.mask[j]; d != 0 {
				return false, scsi.InvalidParam(at[k]+head+j, -1)
			}
		}
		if mine.page == scsi.ModeControl && mine.sub == 0 && p.Body[1]&controlQErr == 0x04 { // reserved
			return false, scsi.InvalidParam(at[k]+head+1, 2)
		}
		next[i] = p.Body
	}
	for i, b := range next {
		if b != nil && !bytes.Equal(b, m.pages[i].current) {
			m.pages[i].current = bytes.Clone(b)
			changed = true
		}
	}
	m.arm()
	return changed, nil
}
