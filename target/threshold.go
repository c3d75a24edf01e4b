package target

import (
	"context"
	"encoding/binary"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/scsi"
)

// Fields of the logical block provisioning mode page (SBC-3 6.5.9), as offsets
// into the body, which has one threshold descriptor, of the used resources.
//
//	byte 0  SITUA(1)   12  enabled(1) type(3)=0 arming(3)=010b, increasing   13  resource=02h   16  count(4)
const (
	thresholdLen       = 20
	thresholdSITUA     = 0x01 // byte 0: tell the nexus alone whose command it was
	thresholdAt        = 12
	thresholdEnabled   = 0x80
	thresholdRising    = 0x02
	thresholdUsed      = 0x02
	thresholdCountByte = 16
)

func thresholdPage() modePage {
	def, mask := make([]byte, thresholdLen), make([]byte, thresholdLen)
	def[thresholdAt], def[thresholdAt+1] = thresholdRising, thresholdUsed
	mask[0], mask[thresholdAt] = thresholdSITUA, thresholdEnabled
	copy(mask[thresholdCountByte:], []byte{0xFF, 0xFF, 0xFF, 0xFF})
	return modePage{page: scsi.ModeInfoExceptions, sub: scsi.SubpageProvisioning, current: append([]byte(nil), def...), mask: mask, defaults: def}
}

// threshold returns what is set: ok is false when nothing is to be told.
func (m *modeState) threshold() (count uint32, single, ok bool) {
	if !m.armed.Load() {
		return 0, false, false
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for i := range m.pages {
		if p := &m.pages[i]; p.page == scsi.ModeInfoExceptions && p.sub == scsi.SubpageProvisioning {
			return binary.BigEndian.Uint32(p.current[thresholdCountByte:]), p.current[0]&thresholdSITUA != 0, p.current[thresholdAt]&thresholdEnabled != 0
		}
	}
	return 0, false, false
}

// arm keeps armed equal to the page, so that a write need not look. mu is held.
func (m *modeState) arm() {
	on := false
	for i := range m.pages {
		p := &m.pages[i]
		on = on || p.page == scsi.ModeInfoExceptions && p.sub == scsi.SubpageProvisioning && p.current[thresholdAt]&thresholdEnabled != 0
	}
	m.armed.Store(on)
}

// usage watches the used resources of a thin unit while a threshold is enabled.
type usage struct {
	dirty, busy, reached atomic.Bool
	by                   atomic.Pointer[session] // wrote last
}

// watchPause is the least time between two counts: counting asks the file system
// for every extent.
const watchPause = time.Second

// wrote tells that a command changed what is allocated.
func (u *logicalUnit) wrote(s *session) {
	if !u.mode.armed.Load() {
		return
	}
	w := &u.usage
	w.by.Store(s)
	w.dirty.Store(true)
	if !w.busy.CompareAndSwap(false, true) {
		return
	}
	u.background(func(ctx context.Context) {
		for {
			for w.dirty.Swap(false) {
				u.count(ctx)
				select {
				case <-time.After(watchPause):
				case <-s.srv.stop:
				}
			}
			w.busy.Store(false)
			if !w.dirty.Load() || !w.busy.CompareAndSwap(false, true) {
				return
			}
		}
	})
}

// count tells 38/07 once each time the used resources rise to the threshold.
func (u *logicalUnit) count(ctx context.Context) {
	limit, single, ok := u.mode.threshold()
	by := u.usage.by.Load()
	if !ok || by == nil {
		return
	}
	used, err := u.used(ctx)
	if err != nil {
		by.log.Warn("thin provisioning threshold", zap.String("volume", u.volume), zap.Error(err))
		return
	}
	if used < limit {
		u.usage.reached.Store(false)
		return
	}
	if u.usage.reached.Swap(true) {
		return
	}
	by.log.Info("thin provisioning threshold is reached", zap.String("volume", u.volume), zap.Uint32("used", used), zap.Uint32("threshold", limit))
	for _, x := range by.srv.list() {
		if x == by || !single && x.tgt != nil && x.tgt.has(u) {
			x.attend(u, scsi.ASCThinThreshold)
		}
	}
}
