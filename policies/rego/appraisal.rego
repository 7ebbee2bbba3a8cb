# Appraisal: what of a verified guest the consortium accepts, beyond the verifier's profile (policies/appraisal.toml).
package sealwright.appraisal

import rego.v1

# An image below this security version (SVN) is refused although its reference values are still there.
min_svn := 0

# Checks that the verifier must not have left unjudged for want of something to judge by.
judged := {"freshness", "init-data", "measurement", "revocation"}

default allow := false

allow if count(reasons) == 0

reasons contains "the appraisal is not affirming" if not affirming

affirming if input.appraisal.status == "affirming"

reasons contains "the verifier left freshness, init-data, measurement or revocation unjudged" if not all_judged

all_judged if {
	unjudged := {name | some name in input.appraisal["not-judged"]}
	count(unjudged & judged) == 0
	is_array(input.appraisal["not-judged"])
}

reasons contains "the evidence is of another platform than the charter" if not same_platform

same_platform if input.appraisal.claims.platform == input.charter.platform

reasons contains "the image is not approved for the role" if not image_approved

image_approved if {
	input.image.name == input.enrolment.image
	input.enrolment.role in input.image.roles
}

reasons contains "the measurement is not one of the image's" if not measured

measured if {
	some reference in input.image.measurements
	reference.measurement == input.appraisal.claims.measurement
}

reasons contains "the init-data is not the one that is enrolled" if not bound

bound if input.appraisal.claims.host_data == input.enrolment.init_data_sha256

reasons contains "the image's security version is too low" if not recent

recent if input.image.svn >= min_svn

reasons contains "the chip is not one of those enrolled" if not chip_may

chip_may if input.enrolment.chips == null

chip_may if input.appraisal.claims.chip_id in input.enrolment.chips
