package raftlog

import (
	"errors"
	"fmt"
	"sync"
	"time"

	armon "github.com/armon/go-metrics"
	armonprom "github.com/armon/go-metrics/prometheus"
	hashi "github.com/hashicorp/go-metrics"
	hashiprom "github.com/hashicorp/go-metrics/prometheus"
	"github.com/prometheus/client_golang/prometheus"
)

var metricsOnce struct {
	sync.Mutex
	done bool
}

// RegisterMetrics sends what raft and memberlist report (hashicorp/go-metrics)
// and what raft-boltdb reports (armon/go-metrics) to reg. Both libraries keep
// one sink a process, so a second call is an error. Metrics that fell silent go
// after a minute.
func RegisterMetrics(reg prometheus.Registerer) error {
	metricsOnce.Lock()
	defer metricsOnce.Unlock()
	if metricsOnce.done {
		return errors.New("register raft metrics: done already in this process")
	}
	hs, err := hashiprom.NewPrometheusSinkFrom(hashiprom.PrometheusOpts{Registerer: reg, Expiration: time.Minute, Name: "blockhouse_hashicorp_sink"})
	if err != nil {
		return fmt.Errorf("register raft metrics: %w", err)
	}
	as, err := armonprom.NewPrometheusSinkFrom(armonprom.PrometheusOpts{Registerer: reg, Expiration: time.Minute, Name: "blockhouse_armon_sink"})
	if err != nil {
		return fmt.Errorf("register raft metrics: %w", err)
	}
	// Runtime metrics come from client_golang's own collector.
	hc := hashi.DefaultConfig("")
	hc.EnableHostname, hc.EnableRuntimeMetrics = false, false
	if _, err := hashi.NewGlobal(hc, hs); err != nil {
		return fmt.Errorf("register raft metrics: %w", err)
	}
	ac := armon.DefaultConfig("")
	ac.EnableHostname, ac.EnableRuntimeMetrics = false, false
	if _, err := armon.NewGlobal(ac, as); err != nil {
		return fmt.Errorf("register raft metrics: %w", err)
	}
	metricsOnce.done = true
	return nil
}
