# Peers: whom a guest talks to, beyond what every peer must prove (an affirming appraisal, an enrolled place).
package sealwright.peers

import rego.v1

# Who may connect to whom: the role that listens, to the roles that may call it.
callers := {
	"gateway": {"inner", "server"},
	"inner": {"gateway", "inner", "site"},
	"server": {"gateway", "inner", "site"},
}

# A peer must have been attested within this time.
max_age_seconds := 300

# Jurisdictions that a peer's host must stand in, if the set is not empty.
jurisdictions := set()

default allow := false

allow if count(reasons) == 0

reasons contains "the peer's appraisal is not affirming" if not affirming

affirming if {
	count(input.peer.submods) > 0
	every submod in input.peer.submods { submod["ear.status"] == "affirming" }
}

reasons contains "guests of these roles do not talk to each other" if not roles_fit

roles_fit if input.peer.role in callers[input.here.role]

roles_fit if input.here.role in callers[input.peer.role]

reasons contains "the peer attested too long ago" if not fresh

fresh if {
	input.peer.age_seconds >= 0
	input.peer.age_seconds <= max_age_seconds
}

reasons contains "the peer's host is not in one of the jurisdictions named" if not jurisdiction_may

jurisdiction_may if count(jurisdictions) == 0

jurisdiction_may if input.peer.jurisdiction in jurisdictions
