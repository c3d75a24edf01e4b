package control

import (
	"context"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/blockhouse-san/blockhouse/api"
	"github.com/blockhouse-san/blockhouse/internal/latency"
)

// storageMetrics exports the numbers of this node's own storage worker. Each
// scrape asks the worker, so what is shown is what is: a session or a LUN that is
// gone is in no later scrape. docs/metrics.md lists all names, with their
// cardinality; a test compares.
type storageMetrics struct {
	ask func(context.Context) (s api.NodeStats, has bool, err error) // has: this node has the role
	log *zap.Logger
}

// scrapeTimeout is well below what Prometheus waits for.
const scrapeTimeout = 2 * time.Second

// maxSessionSeries bounds the sessions that are shown one by one: initiators of an
// open target choose their names.
const maxSessionSeries = 256

var (
	lunLabels     = []string{"target", "lun", "volume"}
	sessionLabels = []string{"target", "initiator", "isid"}
)

func metricDesc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	descStorageUp = metricDesc("blockhouse_storage_up", "1 when the storage worker of this node answers.")

	descLogins       = metricDesc("blockhouse_target_logins_total", "Logins that succeeded, by type of session (normal, discovery).", "type")
	descLoginFails   = metricDesc("blockhouse_target_login_failures_total", "Logins that failed: authentication, or other.", "reason")
	descEnded        = metricDesc("blockhouse_target_sessions_ended_total", "Sessions that ended, by logout of the initiator or otherwise (dropped).", "reason")
	descSessions     = metricDesc("blockhouse_target_sessions", "Sessions that exist.")
	descUnlisted     = metricDesc("blockhouse_target_sessions_unlisted", "Sessions that exist and have no series of their own.")
	descDigest       = metricDesc("blockhouse_target_digest_errors_total", "PDUs with a wrong header or data digest.")
	descRetransmit   = metricDesc("blockhouse_target_retransmits_total", "PDUs sent again because an initiator asked (SNACK).")
	descRejects      = metricDesc("blockhouse_target_rejects_total", "PDUs that were rejected.")
	descPending      = metricDesc("blockhouse_target_pending_bytes", "Memory held by data phases.")
	descLUNCommands  = metricDesc("blockhouse_lun_commands_total", "Commands received.", lunLabels...)
	descLUNProgress  = metricDesc("blockhouse_lun_commands_in_progress", "Commands received and not ended: the queue depth.", lunLabels...)
	descLUNRead      = metricDesc("blockhouse_lun_read_bytes_total", "Bytes sent by reads.", lunLabels...)
	descLUNWritten   = metricDesc("blockhouse_lun_written_bytes_total", "Bytes taken for writes.", lunLabels...)
	descLUNUnmaps    = metricDesc("blockhouse_lun_unmaps_total", "UNMAP commands.", lunLabels...)
	descLUNAborted   = metricDesc("blockhouse_lun_aborted_total", "Commands that ended without a status: task management, a lost session.", lunLabels...)
	descLUNErrors    = metricDesc("blockhouse_lun_errors_total", "Commands that ended with another status than GOOD, by sense key or status.", with(lunLabels, "kind")...)
	descLUNLatency   = metricDesc("blockhouse_lun_latency_seconds", "Time from a command's arrival until its status was queued, by class (read, write, other).", with(lunLabels, "op")...)
	descLUNSessions  = metricDesc("blockhouse_lun_sessions", "Sessions that exist and have used the LUN.", lunLabels...)
	descSessCommands = metricDesc("blockhouse_session_commands_total", "Commands received.", sessionLabels...)
	descSessProgress = metricDesc("blockhouse_session_commands_in_progress", "Commands received and not ended.", sessionLabels...)
	descSessRead     = metricDesc("blockhouse_session_read_bytes_total", "Bytes sent by reads.", sessionLabels...)
	descSessWritten  = metricDesc("blockhouse_session_written_bytes_total", "Bytes taken for writes.", sessionLabels...)
	descSessErrors   = metricDesc("blockhouse_session_errors_total", "Commands that ended with another status than GOOD.", sessionLabels...)
	descSessAborted  = metricDesc("blockhouse_session_aborted_total", "Commands that ended without a status.", sessionLabels...)
	descSessConns    = metricDesc("blockhouse_session_connections", "Connections of the session.", sessionLabels...)
	descSessDigest   = metricDesc("blockhouse_session_digest_errors_total", "PDUs with a wrong digest.", sessionLabels...)
	descSessRetrans  = metricDesc("blockhouse_session_retransmits_total", "PDUs sent again after SNACK.", sessionLabels...)
	descSessLatency  = metricDesc("blockhouse_session_latency_seconds", "As blockhouse_lun_latency_seconds, of one session.", with(sessionLabels, "op")...)
)

// Describe implements prometheus.Collector.
func (c *storageMetrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{descStorageUp, descLogins, descLoginFails, descEnded, descSessions, descUnlisted, descDigest, descRetransmit,
		descRejects, descPending, descLUNCommands, descLUNProgress, descLUNRead, descLUNWritten, descLUNUnmaps, descLUNAborted, descLUNErrors,
		descLUNLatency, descLUNSessions, descSessCommands, descSessProgress, descSessRead, descSessWritten, descSessErrors, descSessAborted,
		descSessConns, descSessDigest, descSessRetrans, descSessLatency} {
		ch <- d
	}
}

// with is l and one more, in memory of its own.
func with(l []string, s string) []string { return append(l[:len(l):len(l)], s) }

// errorKinds are the values of the label kind; each has a series from the start,
// so that a rate over the first error is not lost.
var errorKinds = []string{"not_ready", "medium_error", "hardware_error", "illegal_request", "unit_attention", "data_protect",
	"aborted_command", "miscompare", "reservation_conflict", "task_set_full", "other"}

var ops = []string{"read", "write", "other"}

// Bounds of the exported buckets: powers of two of a microsecond, which are
// bounds of internal/latency too. Sessions get every second one.
func latencyBounds(step int) (out []time.Duration) {
	for k := 4; k <= 24; k += step {
		out = append(out, time.Duration(1<<k)*time.Microsecond)
	}
	return out
}

var lunBounds, sessionBounds = latencyBounds(1), latencyBounds(2)

// Collect implements prometheus.Collector.
func (c *storageMetrics) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	s, has, err := c.ask(ctx)
	if !has {
		return
	}
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	count := func(d *prometheus.Desc, v uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(v), labels...)
	}
	hist := func(d *prometheus.Desc, h latency.Histogram, bounds []time.Duration, labels ...string) {
		b := map[float64]uint64{}
		for _, x := range bounds {
			b[x.Seconds()] = h.Below(x)
		}
		ch <- prometheus.MustNewConstHistogram(d, h.Count(), time.Duration(h.SumNS).Seconds(), b, labels...)
	}
	if err != nil {
		c.log.Debug("no numbers of the storage worker", zap.Error(err))
		gauge(descStorageUp, 0)
		return
	}
	gauge(descStorageUp, 1)
	count(descLogins, s.Logins, "normal")
	count(descLogins, s.Discoveries, "discovery")
	count(descLoginFails, s.AuthFailures, "authentication")
	count(descLoginFails, s.Refused-min(s.AuthFailures, s.Refused), "other")
	count(descEnded, s.Logouts, "logout")
	count(descEnded, s.Drops, "dropped")
	count(descDigest, s.DigestErrors)
	count(descRetransmit, s.Retransmits)
	count(descRejects, s.Rejects)
	gauge(descPending, float64(s.PendingBytes))
	for i := range s.LUNs {
		l := &s.LUNs[i]
		id := []string{l.Target, strconv.Itoa(l.LUN), l.Volume}
		count(descLUNCommands, l.Commands, id...)
		gauge(descLUNProgress, float64(l.InProgress), id...)
		count(descLUNRead, l.ReadBytes, id...)
		count(descLUNWritten, l.WriteBytes, id...)
		count(descLUNUnmaps, l.Unmaps, id...)
		count(descLUNAborted, l.Aborted, id...)
		gauge(descLUNSessions, float64(l.Sessions), id...)
		for _, k := range errorKinds {
			count(descLUNErrors, l.Errors[k], with(id, k)...)
		}
		for _, op := range ops {
			hist(descLUNLatency, l.Latency[op], lunBounds, with(id, op)...)
		}
	}
	shown := map[[3]string]bool{}
	for i := range s.Sessions {
		x := &s.Sessions[i]
		id := []string{x.Target, strings.ToValidUTF8(x.Initiator, "?"), x.ISID}
		// While a session is reinstated there may be two of one name.
		if k := [3]string(id); x.Discovery || x.IO == nil || len(shown) == maxSessionSeries || shown[k] {
			continue
		} else {
			shown[k] = true
		}
		count(descSessCommands, x.IO.Commands, id...)
		gauge(descSessProgress, float64(x.IO.InProgress), id...)
		count(descSessRead, x.IO.ReadBytes, id...)
		count(descSessWritten, x.IO.WriteBytes, id...)
		count(descSessErrors, x.IO.Failed(), id...)
		count(descSessAborted, x.IO.Aborted, id...)
		gauge(descSessConns, float64(x.Connections), id...)
		count(descSessDigest, x.DigestErrors, id...)
		count(descSessRetrans, x.Retransmits, id...)
		for _, op := range ops {
			hist(descSessLatency, x.IO.Latency[op], sessionBounds, with(id, op)...)
		}
	}
	gauge(descSessions, float64(len(s.Sessions)))
	gauge(descUnlisted, float64(len(s.Sessions)-len(shown)))
}
