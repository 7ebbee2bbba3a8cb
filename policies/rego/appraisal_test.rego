# Each test starts from `given` as its input.
package sealwright.appraisal_test

import rego.v1

given := {
	"appraisal": {
		"status": "affirming",
		"not-judged": ["tcb-minimum"],
		"claims": {"platform": "virtual", "measurement": "ab", "host_data": "ef", "chip_id": "01"},
	},
	"charter": {"platform": "virtual"},
	"enrolment": {"role": "site", "name": "borealis", "image": "demo", "init_data_sha256": "ef", "chips": null},
	"image": {"name": "demo", "roles": ["server", "site"], "svn": 1, "measurements": [{"measurement": "ab"}]},
}

test_sound_evidence_is_allowed if { data.sealwright.appraisal.allow }

test_unjudged_is_denied if {
	data.sealwright.appraisal.reasons == {"the verifier left freshness, init-data, measurement or revocation unjudged"}
		with input.appraisal["not-judged"] as ["tcb-minimum", "revocation"]
}

test_other_platform_is_denied if { not data.sealwright.appraisal.allow with input.appraisal.claims.platform as "hardware" }

test_other_measurement_is_denied if { not data.sealwright.appraisal.allow with input.appraisal.claims.measurement as "ac" }

test_other_init_data_is_denied if { not data.sealwright.appraisal.allow with input.appraisal.claims.host_data as "00" }

test_role_not_of_the_image_is_denied if { not data.sealwright.appraisal.allow with input.image.roles as ["server"] }

test_withdrawn_image_is_denied if { not data.sealwright.appraisal.allow with input.image as null }

test_enrolled_chip_is_allowed if { data.sealwright.appraisal.allow with input.enrolment.chips as ["00", "01"] }

test_other_chip_is_denied if { not data.sealwright.appraisal.allow with input.enrolment.chips as ["00"] }
