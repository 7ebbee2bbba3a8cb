# Each test starts from `given` as its input.
package sealwright.floor_test

import rego.v1

given := {
	"at": "2026-03-01T12:00:00Z",
	"counters": {"releases": 0, "releases_this_boot": 0, "releases_to_guest": 0},
	"ear": {
		"subject": {"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo"},
		"submods": {"cpu0": {
			"ear.status": "affirming",
			"ear.trustworthiness-vector": {
				"configuration": 2, "executables": 2, "file-system": 2, "hardware": 2, "instance-identity": 2,
				"runtime-opaque": 2, "sourced-data": 0, "storage-opaque": 0,
			},
			"ear.veraison.annotated-evidence": {"policy": {"debug": false}},
		}},
	},
	"enrolment": {"role": "site", "name": "borealis", "member": "borealis-hospital", "image": "demo"},
	"job": null,
	"resource": {"repository": "borealis-hospital", "type": "key", "tag": "data"},
	"session": {"age_seconds": 3, "protocol": "v1"},
}

test_sound_guest_is_allowed if { data.sealwright.floor.allow }

test_sound_guest_has_no_reasons_against_it if { count(data.sealwright.floor.reasons) == 0 }

test_contraindicated_is_denied if {
	not data.sealwright.floor.allow with input.ear.submods.cpu0["ear.status"] as "contraindicated"
}

test_denial_names_the_rule if {
	data.sealwright.floor.reasons == {"the guest attested too long ago"} with input.session.age_seconds as 301
}

test_two_failures_are_both_named if {
	count(data.sealwright.floor.reasons) == 2 with input.session.age_seconds as 301 with input.ear.subject.name as "cygnus"
}

test_no_submods_is_denied if { not data.sealwright.floor.allow with input.ear.submods as {} }

test_negative_age_is_denied if { not data.sealwright.floor.allow with input.session.age_seconds as -1 }

test_age_as_text_is_denied if { not data.sealwright.floor.allow with input.session.age_seconds as "3" }

test_other_image_than_enrolled_is_denied if { not data.sealwright.floor.allow with input.enrolment.image as "other" }

test_no_enrolment_is_denied if { not data.sealwright.floor.allow with input.enrolment as null }

test_broker_gets_no_keys if {
	not data.sealwright.floor.allow with input.ear.subject.role as "broker" with input.enrolment.role as "broker"
}

test_debugged_guest_is_denied if {
	not data.sealwright.floor.allow with input.ear.submods.cpu0["ear.veraison.annotated-evidence"].policy.debug as true
}

test_silence_about_hardware_is_denied if {
	not data.sealwright.floor.allow with input.ear.submods.cpu0["ear.trustworthiness-vector"].hardware as 0
}

test_warning_anywhere_is_denied if {
	not data.sealwright.floor.allow with input.ear.submods.cpu0["ear.trustworthiness-vector"]["file-system"] as 32
}

test_contraindicated_gpu_is_denied if {
	not data.sealwright.floor.allow with input.ear.submods.gpu0 as {
		"ear.status": "contraindicated", "ear.trustworthiness-vector": {},
	}
}
