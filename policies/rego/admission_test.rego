# Each test starts from `given` as its input.
package sealwright.admission_test

import rego.v1

given := {
	"at": "2026-03-01T12:00:00Z",
	"bundle": {
		"bundle": "12", "job": "hello-pt", "sites": ["borealis", "cygnus"], "note": "", "expires": "2026-04-01T00:00:00Z",
	},
	"here": {"role": "site", "name": "borealis"},
	"job": {
		"job": "j1", "name": "hello-pt", "bundle": "12", "roster": ["borealis", "cygnus"], "server": "server",
		"recipients": ["acme-pharma/ada"], "rounds": 3, "min_sites": 2, "submitter": "acme-pharma/ada",
	},
	"recipients": [{"member": "acme-pharma", "name": "ada", "rights": ["submit", "download"]}],
	"submitter": {"member": "acme-pharma", "name": "ada", "rights": ["submit", "download"]},
}

test_approved_job_is_allowed_at_a_site if { data.sealwright.admission.allow }

test_approved_job_is_allowed_at_its_server if {
	data.sealwright.admission.allow with input.here as {"role": "server", "name": "server"}
}

test_unapproved_bundle_is_denied if { not data.sealwright.admission.allow with input.bundle as null }

test_other_bundle_is_denied if {
	data.sealwright.admission.reasons == {"the bundle is not approved"} with input.job.bundle as "13"
}

test_lapsed_approval_is_denied if { not data.sealwright.admission.allow with input.at as "2026-04-01T00:00:00Z" }

test_site_without_approval_is_denied if {
	not data.sealwright.admission.allow with input.job.roster as ["borealis", "cygnus", "delta"]
}

test_site_outside_the_roster_is_denied if { not data.sealwright.admission.allow with input.here.name as "delta" }

test_other_server_is_denied if {
	not data.sealwright.admission.allow with input.here as {"role": "server", "name": "server-2"}
}

test_viewer_may_not_submit if { not data.sealwright.admission.allow with input.submitter.rights as ["view"] }

test_submitter_of_another_name_is_denied if { not data.sealwright.admission.allow with input.submitter.name as "bob" }

test_unknown_submitter_is_denied if { not data.sealwright.admission.allow with input.submitter as null }

test_recipient_without_the_right_is_denied if {
	not data.sealwright.admission.allow with input.recipients as [{"member": "acme-pharma", "name": "ada", "rights": []}]
}

test_unknown_recipient_is_denied if { not data.sealwright.admission.allow with input.job.recipients as ["acme-pharma/bob"] }

test_no_recipient_is_denied if { not data.sealwright.admission.allow with input.job.recipients as [] }

test_single_site_is_denied if { not data.sealwright.admission.allow with input.job.min_sites as 1 }

test_more_sites_than_roster_is_denied if { not data.sealwright.admission.allow with input.job.min_sites as 3 }

test_endless_rounds_are_denied if { not data.sealwright.admission.allow with input.job.rounds as 1001 }

test_rounds_as_text_are_denied if { not data.sealwright.admission.allow with input.job.rounds as "3" }
