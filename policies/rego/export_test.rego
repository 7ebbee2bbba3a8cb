# Each test starts from `given` as its input.
package sealwright.export_test

import rego.v1

given := {
	"from": {"role": "site", "name": "borealis"},
	"job": {"server": "server", "recipients": ["acme-pharma/ada"]},
	"kind": "update",
	"size": 1000,
	"to": {"role": "server", "name": "server", "jurisdiction": "DE"},
}

test_update_goes_to_the_server if { data.sealwright.export.allow }

test_update_to_another_server_is_denied if { not data.sealwright.export.allow with input.to.name as "server-2" }

test_update_to_a_site_is_denied if { not data.sealwright.export.allow with input.to.role as "site" }

test_unknown_kind_is_denied if { not data.sealwright.export.allow with input.kind as "raw" }

test_large_metric_is_denied if {
	not data.sealwright.export.allow with input.kind as "metric" with input.size as 4097
}

test_negative_size_is_denied if { not data.sealwright.export.allow with input.size as -1 }

test_sealed_result_goes_to_its_recipient if {
	data.sealwright.export.allow with input.kind as "result"
		with input.from.role as "server"
		with input.to as {"role": "user", "name": "acme-pharma/ada"}
		with input.sealed as true
}

test_open_result_is_denied if {
	not data.sealwright.export.allow with input.kind as "result"
		with input.from.role as "server"
		with input.to as {"role": "user", "name": "acme-pharma/ada"}
}

test_result_to_another_is_denied if {
	not data.sealwright.export.allow with input.kind as "result"
		with input.from.role as "server"
		with input.to as {"role": "user", "name": "acme-pharma/eve"}
		with input.sealed as true
}
