# Export: what may leave a guest, to whom, how much. The guest's export gate evaluates it for each thing that leaves.
package sealwright.export

import rego.v1

# Bytes of one thing, by its kind; a kind that is not here does not leave.
max_bytes := {
	"log": 65536,
	"metric": 4096,
	"result": 17179869184,
	"update": 17179869184,
}

# Jurisdictions of the hosts to which updates and results may go, if the set is not empty.
jurisdictions := set()

default allow := false

allow if count(reasons) == 0

reasons contains "nothing of this kind leaves, or it is too large" if not within_size

within_size if {
	input.size >= 0
	input.size <= max_bytes[input.kind]
}

reasons contains "it does not go where things of this kind may go" if not right_place

# Updates, metrics and logs go from a site to the job's server, and nowhere else.
right_place if {
	input.kind in {"log", "metric", "update"}
	input.from.role in {"inner", "site"}
	input.to.role in {"inner", "server"}
	input.to.name in {input.job.server, object.get(input.job, "inner", input.job.server)}
}

# Results go from the server to a recipient that the job's record names, sealed.
right_place if {
	input.kind == "result"
	input.from.role == "server"
	input.to.role == "user"
	input.to.name in input.job.recipients
	input.sealed == true
}

reasons contains "it would leave the jurisdictions that the consortium named" if not jurisdiction_may

jurisdiction_may if count(jurisdictions) == 0

jurisdiction_may if input.to.jurisdiction in jurisdictions
