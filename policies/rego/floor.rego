# The floor: what every release needs, whatever its owner's own policy says.
#
# A broker evaluates it before the owner's release policy and apart from it; both must allow. Input: docs/reference/
# charter.md, "What a policy sees". Members change it by their threshold for `policies`.
package sealwright.floor

import rego.v1

# A guest must have attested again within this time.
max_session_age_seconds := 300

# Only these roles ever get keys.
roles := {"gateway", "inner", "server", "site"}

# What the verifier must have vouched for (AR4SI: 2 to 31 is affirming; 0 would be silence).
vouched := {"configuration", "executables", "hardware", "instance-identity"}

default allow := false

allow if count(reasons) == 0

reasons contains "the appraisal of the guest is not affirming in every part" if not affirming

affirming if {
	count(input.ear.submods) > 0
	every submod in input.ear.submods { submod["ear.status"] == "affirming" }
}

reasons contains "the verifier did not vouch for instance, configuration, executables and hardware" if not vouched_for

vouched_for if {
	vector := input.ear.submods.cpu0["ear.trustworthiness-vector"]
	every claim in vouched {
		vector[claim] >= 2
		vector[claim] <= 31
	}
}

reasons contains "some part of the appraisal warns" if warned

warned if {
	some submod in input.ear.submods
	some value in submod["ear.trustworthiness-vector"]
	not sound(value)
}

sound(value) if {
	value >= 0
	value <= 31
}

reasons contains "the guest is not known to run without a debugger" if not undebugged

undebugged if input.ear.submods.cpu0["ear.veraison.annotated-evidence"].policy.debug == false

reasons contains "the attested guest is not the one that is enrolled" if not in_its_place

in_its_place if {
	input.ear.subject.role == input.enrolment.role
	input.ear.subject.name == input.enrolment.name
	input.ear.subject.member == input.enrolment.member
	input.ear.subject.image == input.enrolment.image
}

reasons contains "a guest of this role gets no keys" if not role_may

role_may if input.ear.subject.role in roles

reasons contains "the guest attested too long ago" if not fresh

fresh if {
	input.session.age_seconds >= 0
	input.session.age_seconds <= max_session_age_seconds
}
