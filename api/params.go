package api

import (
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// TargetParam is a parameter of a target that an administrator may set.
type TargetParam struct {
	Name     string
	Default  string   // what our target does without it
	Min, Max uint64   // of a number; Max 0: not a number
	Values   []string // of a choice; a list in order of preference is several of them, with commas
}

// TargetParams are those that TargetSet takes, in tgtadm's order: RFC 7143
// section 13, and tgtadm's own.
var TargetParams = []TargetParam{
	{Name: "nop_interval", Default: "1", Max: 3600},
	{Name: "nop_count", Default: "1", Max: 100},
	{Name: "MaxRecvDataSegmentLength", Default: "262144", Min: 512, Max: 16777215},
	{Name: "HeaderDigest", Default: "None,CRC32C", Values: []string{"None", "CRC32C"}},
	{Name: "DataDigest", Default: "None,CRC32C", Values: []string{"None", "CRC32C"}},
	{Name: "InitialR2T", Default: "No", Values: yesNo},
	{Name: "MaxOutstandingR2T", Default: "8", Min: 1, Max: 65535},
	{Name: "ImmediateData", Default: "Yes", Values: yesNo},
	{Name: "FirstBurstLength", Default: "262144", Min: 512, Max: 16777215},
	{Name: "MaxBurstLength", Default: "1048576", Min: 512, Max: 16777215},
	{Name: "DataPDUInOrder", Default: "Yes", Values: []string{"Yes"}},
	{Name: "DataSequenceInOrder", Default: "Yes", Values: []string{"Yes"}},
	{Name: "ErrorRecoveryLevel", Default: "1", Max: 2},
	{Name: "IFMarker", Default: "No", Values: []string{"No"}},
	{Name: "OFMarker", Default: "No", Values: []string{"No"}},
	{Name: "DefaultTime2Wait", Default: "2", Max: 3600},
	{Name: "DefaultTime2Retain", Default: "0", Max: 3600},
	{Name: "OFMarkInt", Default: "Reject", Values: []string{"Reject"}},
	{Name: "IFMarkInt", Default: "Reject", Values: []string{"Reject"}},
	{Name: "MaxConnections", Default: "8", Min: 1, Max: 65535},
	{Name: "RDMAExtensions", Default: "No", Values: []string{"No"}},
	{Name: "TargetRecvDataSegmentLength", Default: "262144", Min: 512, Max: 16777215},
	{Name: "InitiatorRecvDataSegmentLength", Default: "262144", Min: 512, Max: 16777215},
	{Name: "MaxOutstandingUnexpectedPDUs", Default: "0", Max: 65535},
	{Name: "MaxXmitDataSegmentLength", Default: "262144", Min: 512, Max: 16777215},
	{Name: "MaxQueueCmd", Default: "128", Min: 1, Max: 512},
}

// PortalAddress gives ADDRESS[:PORT] the port that RFC 7143 14.2 has for iSCSI where
// it has none. What is no address stays as it is.
func PortalAddress(s string) string {
	if ip, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(ip, 3260).String()
	}
	if in, ok := strings.CutPrefix(s, "["); ok {
		if ip, err := netip.ParseAddr(strings.TrimSuffix(in, "]")); err == nil && strings.HasSuffix(s, "]") {
			return netip.AddrPortFrom(ip, 3260).String()
		}
	}
	return s
}

// Parameters of a target that send initiators to another portal when they log in
// (RFC 7143 11.13.5), by tgtadm's names. RedirectAddress alone is enough: the port
// is 3260 without RedirectPort, and the reason Temporary. A login at the very
// portal that they name is taken.
const (
	RedirectAddress = "RedirectAddress"
	RedirectPort    = "RedirectPort"
	RedirectReason  = "RedirectReason" // Temporary, Permanent
)

// RedirectOf is where parameters send initiators, as HOST:PORT, and whether they
// should remember it; empty: nowhere.
func RedirectOf(params map[string]string) (portal string, permanent bool) {
	a := params[RedirectAddress]
	if a == "" {
		return "", false
	}
	port := params[RedirectPort]
	if port == "" {
		port = "3260"
	}
	return net.JoinHostPort(a, port), params[RedirectReason] == "Permanent"
}

// checkRedirect is CheckTargetParam for those; ok tells whether name is one.
func checkRedirect(name, value string) (ok bool, err error) {
	switch {
	case name != RedirectAddress && name != RedirectPort && name != RedirectReason:
		return false, nil
	case value == "":
	case name == RedirectReason && value != "Temporary" && value != "Permanent":
		return true, fmt.Errorf("%s=%s: Temporary or Permanent is possible", name, value)
	case name == RedirectPort:
		if n, err := strconv.ParseUint(value, 10, 16); err != nil || n == 0 {
			return true, fmt.Errorf("%s=%s: 1 to 65535 are possible", name, value)
		}
	case name == RedirectAddress:
		ip, err := netip.ParseAddr(value)
		switch {
		case err == nil && (ip.IsUnspecified() || ip.IsMulticast() || ip.Zone() != ""):
			return true, fmt.Errorf("%s=%s: no initiator can connect to that", name, value)
		case err != nil && !dnsName.MatchString(value):
			return true, fmt.Errorf("%s=%s: an address, or a host name that initiators can resolve; the port is %s", name, value, RedirectPort)
		}
	}
	return true, nil
}

// dnsName is a host name (RFC 1123 2.1) that is not made of digits alone.
var dnsName = regexp.MustCompile(`^([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)*[A-Za-z]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?$`)

var yesNo = []string{"Yes", "No"}

// CheckTargetParam says what is wrong with a parameter; an empty value is the
// default and always right.
func CheckTargetParam(name, value string) error {
	if ok, err := checkRedirect(name, value); ok {
		return err
	}
	i := slices.IndexFunc(TargetParams, func(p TargetParam) bool { return p.Name == name })
	if i < 0 {
		return fmt.Errorf("unknown parameter %q", name)
	}
	p := &TargetParams[i]
	switch {
	case value == "":
	case len(p.Values) == 0:
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil || n < p.Min || n > p.Max {
			return fmt.Errorf("%s=%s: %d to %d are possible", name, value, p.Min, p.Max)
		}
	default:
		seen := map[string]bool{}
		for v := range strings.SplitSeq(value, ",") {
			if !slices.Contains(p.Values, v) || seen[v] || len(seen) > 0 && !strings.Contains(p.Default, ",") {
				return fmt.Errorf("%s=%s: %s is possible", name, value, strings.Join(p.Values, " or "))
			}
			seen[v] = true
		}
	}
	return nil
}
