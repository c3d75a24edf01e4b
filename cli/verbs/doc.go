// Package verbs is the modern noun-verb tree of clusteradm: one file a noun.
// It asks clusterd through package api and prints what it answers; it holds no
// logic of the cluster.
//
// Conventions, which docs/cli.md tells the user: data on stdout, progress and
// errors on stderr; -o json prints the very types of package api; exit codes
// are those of api.Code.Exit; nothing prompts without a terminal; every command
// has a deadline.
//
// It may be imported by cli only.
package verbs
