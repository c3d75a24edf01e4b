// Package demo runs a whole cluster on one machine, as an ordinary user: three
// nodes of three processes each on loopback addresses, with their data below
// one folder. Every step is a command that a user could type: it is printed and
// then really run.
//
// The folder says everything: demo.json holds what was chosen, one folder a node
// holds the rest. Processes are found by what /proc says of them now, never by a
// remembered number alone, so that nothing foreign is ever killed.
//
// cli/verbs imports it; it imports api and config.
package demo
