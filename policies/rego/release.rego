# A release policy, ready to use: who may have one resource. Its owner alone signs it; nothing overrides it but the
# floor. `seal charter release-policy` writes it with other constants: change those, keep the rules.
package sealwright.release

import rego.v1

# Roles and, if the set is not empty, names and images of the guests that may have it.
roles := {"site"}

names := set()

images := set()

# Members whose guests may have it, if the set is not empty.
members := set()

# Jurisdictions that the guest's host must stand in, if the set is not empty.
jurisdictions := set()

# Places that the owner has approved itself, "role/name" to the init-data's digest, if not empty.
approved_init_data := {}

# The guest must have attested within this time.
max_session_age_seconds := 300

# How often in all it is released, counted from the ledger.
max_releases := 1000

default allow := false

allow if count(reasons) == 0

reasons contains "the appraisal of the guest is not affirming" if not affirming

affirming if input.ear.submods.cpu0["ear.status"] == "affirming"

reasons contains "the guest does not have the role that may have it" if not role_may

role_may if input.ear.subject.role in roles

reasons contains "the guest is not one of those named" if not name_may

name_may if count(names) == 0

name_may if input.ear.subject.name in names

reasons contains "the guest's image is not one of those named" if not image_may

image_may if count(images) == 0

image_may if input.ear.subject.image in images

reasons contains "the guest's member is not one of those named" if not member_may

member_may if count(members) == 0

member_may if input.ear.subject.member in members

reasons contains "the guest's host is not in one of the jurisdictions named" if not jurisdiction_may

jurisdiction_may if count(jurisdictions) == 0

jurisdiction_may if input.enrolment.jurisdiction in jurisdictions

reasons contains "the owner has not approved this guest's place and init-data" if not place_may

place_may if count(approved_init_data) == 0

place_may if {
	place := concat("/", [input.enrolment.role, input.enrolment.name])
	approved_init_data[place] == input.enrolment.init_data_sha256
}

reasons contains "the guest attested too long ago" if not fresh

fresh if {
	input.session.age_seconds >= 0
	input.session.age_seconds <= max_session_age_seconds
}

reasons contains "it was released as often as its owner allows" if not within_budget

within_budget if {
	input.counters.releases >= 0
	input.counters.releases < max_releases
}
