package clusterconf

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// kind is what an element may have.
type kind struct {
	need     []string // attributes
	may      []string
	open     bool // any attribute: they belong to a program
	children map[string]*kind
	once     []string // children that may stand once
	res      bool     // any resource may stand in it
}

func leaf(need, may string) *kind {
	return &kind{need: strings.Fields(need), may: strings.Fields(may)}
}

func node(need, may string, children map[string]*kind) *kind {
	k := leaf(need, may)
	k.children = children
	return k
}

var (
	logAttrs   = "to_syslog to_logfile syslog_facility syslog_priority logfile_priority logfile debug"
	plockAttrs = "enable_plock plock_debug plock_rate_limit plock_ownership drop_resources_time drop_resources_count drop_resources_age"
	subtree    = "__independent_subtree __enforce_timeouts __max_failures __failure_expire_time __max_restarts __restart_expire_time"
	device     = &kind{need: []string{"name"}, open: true}
)

// resources are the types that rgmanager knows. What stands in them is their
// agent's matter.
var resources = strings.Fields("ip fs clusterfs netfs nfsexport nfsclient nfsserver script lvm lvm_by_lv lvm_by_vg mysql apache named openldap postgres-8 " +
	"tomcat-5 tomcat-6 samba smb oracledb orainstance oralistener SAPInstance SAPDatabase ASEHAagent drbd bind-mount checkquorum db2 ocf vm service action")

// serviceAttrs are those of a service; the others are its agent's.
var serviceAttrs = strings.Fields("name ref domain autostart exclusive hardrecovery recovery depend depend_mode max_restarts restart_expire_time priority nfslock nfs_client_cache " + subtree)

var schema = &kind{
	need: []string{"name", "config_version"}, may: []string{"alias"},
	once: strings.Fields("cman totem quorumd fence_daemon fence_xvmd dlm gfs_controld group logging clusternodes fencedevices rm clvmd"),
	children: map[string]*kind{
		"cman": {may: strings.Fields("two_node expected_votes upgrading disallowed quorum_dev_poll shutdown_timeout ccsd_poll debug_mask port cluster_id hash_cluster_id nodename broadcast transport keyfile disable_openais"),
			once: []string{"multicast"}, children: map[string]*kind{"multicast": leaf("", "addr ttl")}},
		"totem": node("", "consensus join token fail_recv_const token_retransmits_before_loss_const rrp_mode secauth keyfile", map[string]*kind{
			"interface": leaf("", "ringnumber bindnetaddr mcastaddr mcastport broadcast")}),
		"quorumd": node("", "interval tko votes min_score device label cman_label status_file scheduler reboot priority tko_up upgrade_wait master_wait use_uptime stop_cman paranoid allow_kill max_error_cycles io_timeout master_wins log_level log_facility", map[string]*kind{
			"heuristic": leaf("program", "score interval tko")}),
		"fence_daemon": leaf("", "post_join_delay post_fail_delay override_path override_time clean_start skip_undefined"),
		"fence_xvmd":   leaf("", "debug port use_uuid multicast_address auth hash uri key_file multicast_interface"),
		"dlm": node("", "log_debug timewarn protocol enable_fencing enable_quorum enable_deadlk "+plockAttrs, map[string]*kind{
			"lockspace": node("name", "nodir", map[string]*kind{"master": leaf("name", "weight")})}),
		"gfs_controld": leaf("", "enable_withdraw "+plockAttrs),
		"group":        leaf("", "groupd_compat"),
		"logging":      node("", logAttrs, map[string]*kind{"logging_daemon": leaf("name", "subsys "+logAttrs)}),
		"clusternodes": node("", "", map[string]*kind{
			"clusternode": {need: []string{"name", "nodeid"}, may: []string{"votes", "weight"}, once: []string{"fence", "unfence"}, children: map[string]*kind{
				"altname": leaf("name", "port mcast ttl"),
				"fence":   node("", "", map[string]*kind{"method": node("name", "", map[string]*kind{"device": device})}),
				"unfence": node("", "", map[string]*kind{"device": device}),
			}}}),
		"fencedevices": node("", "", map[string]*kind{"fencedevice": {need: []string{"name", "agent"}, open: true}}),
		"rm": {may: strings.Fields("log_level log_facility status_child_max status_poll_interval transition_throttling central_processing"),
			once: []string{"failoverdomains", "events", "resources", "resource-defaults"},
			children: map[string]*kind{
				"failoverdomains": node("", "", map[string]*kind{"failoverdomain": node("name", "ordered restricted nofailback", map[string]*kind{"failoverdomainnode": leaf("name", "priority")})}),
				"events":          node("", "", map[string]*kind{"event": leaf("name", "file priority class service service_state service_owner node node_id node_state node_clean node_local")}),
				"resources":       {res: true}, "resource-defaults": {res: true},
				"service": {may: serviceAttrs, res: true},
				"vm":      {open: true, res: true},
			}},
		"clvmd": leaf("", "interface"),
	},
}

var resourceKind = &kind{open: true, res: true}
var innerService = &kind{may: serviceAttrs, res: true}

// check compares an element with the schema. unknown is told about elements and
// attributes that cluster.conf does not have, bad about what is missing or twice.
// Unknown elements are taken out of the tree.
func (k *kind) check(e *Element, unknown, bad func(line int, why string)) {
	for _, n := range k.need {
		if v, ok := e.Attrs.Get(n); !ok || v == "" {
			bad(e.Line, fmt.Sprintf("<%s> needs the attribute %s", e.Name, n))
		}
	}
	if !k.open {
		known := slices.Concat(k.need, k.may)
		e.Attrs = slices.DeleteFunc(e.Attrs, func(a Attr) bool {
			if slices.Contains(known, a.Name) {
				return false
			}
			unknown(e.Line, fmt.Sprintf("<%s> has no attribute %s%s", e.Name, a.Name, suggest(a.Name, known)))
			return true
		})
	}
	count := map[string]int{}
	e.Children = slices.DeleteFunc(e.Children, func(c *Element) bool {
		next := k.children[c.Name]
		if next == nil && k.res && slices.Contains(resources, c.Name) {
			if next = resourceKind; c.Name == "service" {
				next = innerService
			}
		}
		if next == nil {
			known := slices.Sorted(maps.Keys(k.children))
			if k.res {
				known = append(known, resources...)
			}
			unknown(c.Line, fmt.Sprintf("<%s> has no element <%s>%s", e.Name, c.Name, suggest(c.Name, known)))
			return true
		}
		if count[c.Name]++; count[c.Name] == 2 && slices.Contains(k.once, c.Name) {
			bad(c.Line, fmt.Sprintf("<%s> has the element <%s> twice", e.Name, c.Name))
		}
		next.check(c, unknown, bad)
		return false
	})
}

// suggest finds a known name at an edit distance of one or two.
func suggest(name string, known []string) string {
	best, at := "", 3
	for _, k := range known {
		if d := distance(name, k); d < at && d < len(k) {
			best, at = k, d
		}
	}
	if best == "" {
		return ""
	}
	return "; is it " + best + "?"
}

func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		prev := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			prev, row[j] = row[j], min(row[j]+1, row[j-1]+1, prev+cost)
		}
	}
	return row[len(b)]
}
