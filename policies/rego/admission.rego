# Admission: which jobs run. Server and sites evaluate it each on their own, before anything of the job runs.
package sealwright.admission

import rego.v1

# An aggregate over fewer sites would be one site's own update; in a job of devices, over fewer devices one device's.
min_sites := 2

min_devices := 2

max_rounds := 1000

default allow := false

allow if count(reasons) == 0

reasons contains "the bundle is not approved" if not approved

approved if input.bundle.bundle == input.job.bundle

reasons contains "the approval of the bundle has lapsed" if not in_time

# Both are RFC 3339 in UTC with whole seconds, so their order is that of their texts.
in_time if input.at < input.bundle.expires

reasons contains "a site of the roster is not one that the bundle is approved for" if not sites_approved

sites_approved if {
	count(input.job.roster) > 0
	every site in input.job.roster { site in input.bundle.sites }
}

reasons contains "this guest has no part in the job" if not takes_part

takes_part if {
	input.here.role in {"site", "gateway", "inner"}
	input.here.name in input.job.roster
}

takes_part if {
	input.here.role == "server"
	input.here.name == input.job.server
}

reasons contains "the submitter is not a user who may submit" if not may_submit

may_submit if {
	input.job.submitter == concat("/", [input.submitter.member, input.submitter.name])
	"submit" in input.submitter.rights
}

reasons contains "a recipient is not a user who may download" if not may_receive

may_receive if {
	count(input.job.recipients) > 0
	every name in input.job.recipients { downloads(name) }
}

downloads(name) if {
	some user in input.recipients
	name == concat("/", [user.member, user.name])
	"download" in user.rights
}

reasons contains "too few sites take part in each round" if not enough_sites

enough_sites if {
	input.job.devices >= min_devices
	input.job.min_sites <= count(input.job.roster)
}

enough_sites if {
	not input.job.devices
	input.job.min_sites >= min_sites
	input.job.min_sites <= count(input.job.roster)
}

reasons contains "the number of rounds is out of bounds" if not few_rounds

few_rounds if {
	input.job.rounds >= 1
	input.job.rounds <= max_rounds
}
