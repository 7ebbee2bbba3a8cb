# Each test starts from `given` as its input.
package sealwright.peers_test

import rego.v1

given := {
	"here": {"role": "server", "name": "server"},
	"peer": {
		"role": "site", "name": "borealis", "member": "borealis-hospital", "jurisdiction": "DE", "age_seconds": 3,
		"submods": {"cpu0": {"ear.status": "affirming"}},
	},
}

test_site_talks_to_server if { data.sealwright.peers.allow }

test_server_talks_to_site if {
	data.sealwright.peers.allow with input.here.role as "site" with input.peer.role as "server"
}

test_sites_do_not_talk_to_each_other if { not data.sealwright.peers.allow with input.here.role as "site" }

test_brokers_are_no_peers if { not data.sealwright.peers.allow with input.peer.role as "broker" }

test_denial_names_the_rule if {
	data.sealwright.peers.reasons == {"the peer attested too long ago"} with input.peer.age_seconds as 301
}

test_warning_is_denied if { not data.sealwright.peers.allow with input.peer.submods.cpu0["ear.status"] as "warning" }

test_no_appraisal_is_denied if { not data.sealwright.peers.allow with input.peer.submods as {} }
