package storage

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/target"
)

// applyParams makes what an administrator set of a target (api.TargetParams) the
// target's limits. What api has checked is not checked again; a value that is no
// number is an error all the same, because a limit must not be lost silently.
func applyParams(t *target.Target, params map[string]string) error {
	if len(params) == 0 {
		return nil
	}
	t.Redirect, t.RedirectForever = api.RedirectOf(params)
	w := target.DefaultWant()
	nums := map[string]*int{
		"MaxRecvDataSegmentLength": &w.MaxRecv, "MaxOutstandingR2T": &w.MaxOutstandingR2T, "FirstBurstLength": &w.FirstBurstLength,
		"MaxBurstLength": &w.MaxBurstLength, "DefaultTime2Wait": &w.DefaultTime2Wait, "MaxConnections": &w.MaxConnections,
		"ErrorRecoveryLevel": &w.ErrorRecoveryLevel, "MaxXmitDataSegmentLength": &t.MaxSend, "MaxQueueCmd": &t.QueueDepth,
	}
	level := w.ErrorRecoveryLevel
	interval, count := -1, 1
	nums["nop_interval"], nums["nop_count"] = &interval, &count
	for name, v := range params {
		if p, ok := nums[name]; ok {
			n, err := strconv.Atoi(v)
			if err != nil {
				return fmt.Errorf("parameter %s=%s: want a number", name, v)
			}
			*p = n
			continue
		}
		switch name {
		case "HeaderDigest":
			w.HeaderDigests = strings.Split(v, ",")
		case "DataDigest":
			w.DataDigests = strings.Split(v, ",")
		case "InitialR2T":
			w.InitialR2T = v == "Yes"
		case "ImmediateData":
			w.ImmediateData = v == "Yes"
		}
	}
	// A limit above what the target does is met: the smaller one is negotiated.
	w.ErrorRecoveryLevel = min(w.ErrorRecoveryLevel, level)
	w.FirstBurstLength = min(w.FirstBurstLength, w.MaxBurstLength)
	t.Want = w
	// tgtd pings every nop_interval seconds and gives a connection up that leaves
	// nop_count pings unanswered; 0 of either is never.
	switch {
	case interval == 0 || count == 0:
		t.NopInterval = -1
	case interval > 0:
		t.NopInterval = time.Duration(interval) * time.Second
		t.NopTimeout = time.Duration(count) * t.NopInterval
	case params["nop_count"] != "":
		t.NopTimeout = time.Duration(count) * time.Second
	}
	return nil
}
