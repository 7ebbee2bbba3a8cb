"""Each ready-made set of rights against each command."""

from __future__ import annotations

from typing import Literal

import pytest
from charter_world import NOW, World, user

from policies.charter import Charter, load_charter
from policies.documents import RIGHTS, RIGHTS_SETS
from policies.rights import COMMANDS, NEEDED, command_reasons

MAY = {
    "project-admin": set(COMMANDS) - {"clone"},
    "org-admin": {"abort", "delete", "list", "report", "watch", "approve", "reject", "restart", "stop"},
    "lead": {"submit", "abort", "delete", "download", "list", "report", "watch", "restart", "stop"},
    "member": {"list", "report", "watch"},
    "nothing": set(),
}
"""Which commands a user of each set may give about somebody else's job."""


@pytest.fixture(scope="module")
def charter() -> Charter:
    world = World().found()
    sets = {**RIGHTS_SETS, "nothing": ()}
    people = [user("cygnus-bio", name).model_copy(update={"rights": rights}) for name, rights in sets.items()]
    own = user("cygnus-bio", "submitter").model_copy(update={"rights": ("submit",)})
    store = world.amend(world.put(*people, own), by=("acme-pharma", "borealis-hospital", "cygnus-bio"))
    return load_charter(store, world.root, NOW)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("rights", MAY)
def test_each_set_may_give_its_commands_and_no_other(charter: Charter, rights: str, command: str) -> None:
    reasons = command_reasons(charter, f"cygnus-bio/{rights}", command, submitter="acme-pharma/ada")  # type: ignore[arg-type]
    assert (reasons == ()) == (command in MAY[rights])
    assert all(f"cygnus-bio/{rights}" in reason for reason in reasons)


@pytest.mark.parametrize("command", ["abort", "delete"])
def test_who_may_submit_may_stop_and_delete_the_own_job_and_no_other(
    charter: Charter, command: Literal["abort", "delete"]
) -> None:
    own, other = "cygnus-bio/submitter", "acme-pharma/ada"
    assert command_reasons(charter, own, command, submitter=own) == ()
    assert command_reasons(charter, own, command, submitter=other)
    assert command_reasons(charter, "cygnus-bio/member", command, submitter="cygnus-bio/member")
    assert command_reasons(charter, own, command)


def test_a_job_is_cloned_by_who_submitted_it_and_may_submit_still(charter: Charter) -> None:
    """The first model is the submitter's: whoever else ran it for one round would have it."""
    for who in ("cygnus-bio/submitter", "cygnus-bio/lead"):
        assert command_reasons(charter, who, "clone", submitter=who) == ()
    assert (
        "did not submit the job" in command_reasons(charter, "cygnus-bio/lead", "clone", submitter="acme-pharma/ada")[0]
    )
    assert command_reasons(charter, "cygnus-bio/org-admin", "clone", submitter="cygnus-bio/org-admin")


def test_strangers_may_nothing(charter: Charter) -> None:
    for name in ("cygnus-bio/eve", "nobody/lead", "lead", "", "acme-pharma/lead"):
        assert "no user of charter" in command_reasons(charter, name, "list")[0]


def test_every_right_is_one_that_some_command_needs() -> None:
    assert set(NEEDED.values()) == set(RIGHTS)
