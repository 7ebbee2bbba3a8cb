# Each test starts from `given` as its input.
package sealwright.release_test

import rego.v1

given := {
	"counters": {"releases": 0, "releases_this_boot": 0, "releases_to_guest": 0},
	"ear": {
		"subject": {"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo"},
		"submods": {"cpu0": {"ear.status": "affirming"}},
	},
	"enrolment": {
		"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo", "init_data_sha256": "ef",
	},
	"session": {"age_seconds": 3, "protocol": "v1"},
}

test_site_is_allowed if { data.sealwright.release.allow }

test_server_is_denied if { not data.sealwright.release.allow with input.ear.subject.role as "server" }

test_denial_names_the_rule if {
	data.sealwright.release.reasons == {"the guest does not have the role that may have it"} with input.ear.subject.role as "server"
}

test_warning_is_denied if { not data.sealwright.release.allow with input.ear.submods.cpu0["ear.status"] as "warning" }

test_last_release_is_allowed if { data.sealwright.release.allow with input.counters.releases as 999 }

test_budget_is_spent if { not data.sealwright.release.allow with input.counters.releases as 1000 }

test_negative_count_is_denied if { not data.sealwright.release.allow with input.counters.releases as -1 }

test_old_session_is_denied if { not data.sealwright.release.allow with input.session.age_seconds as 301 }

test_no_subject_is_denied if { not data.sealwright.release.allow with input.ear.subject as null }
