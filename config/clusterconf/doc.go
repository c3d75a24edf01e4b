// Package clusterconf reads cluster.conf, the XML file of cman, fenced and
// rgmanager (cluster.conf(5); facts/cluster.md §1.4), and writes it. It is how an
// old cluster comes here: nothing reads the file while a cluster runs, the truth
// is the replicated state.
//
// Reading is strict: an element or attribute that cluster.conf does not have is an
// error with its line, because a misspelt option is an option that does not work;
// Lenient makes it a warning. Elements whose attributes belong to programs (fence
// devices and their uses, resources) take any attribute. Validate checks what the
// schema cannot (references, numbers that belong together), and Notes says for
// each option that means something else here, or nothing, what becomes of it.
//
// Leaf: everyone may import it; it imports nothing of ours.
package clusterconf
