"""Rules about peers and exports in a real federation: what they refuse is cut, or stays, and is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from federation_world import SERVER, SITES, TRAIN, FederationWorld, found_federation, make_job, wait_until

from attestation.errors import PeerRefused
from policies.charter import Changes
from policies.errors import Refused
from policies.ready_made import ready_made

ADA = "acme-pharma/ada"
HOSPITAL = SITES[0]


@pytest.fixture
def world(tmp_path: Path) -> FederationWorld:
    """Its server stands in the United States, by enrolment."""
    made = found_federation(tmp_path)
    server = made.charter().enrolment("server", SERVER)
    assert server is not None
    american = server.model_copy(update={"jurisdiction": "US"})
    made.change(Changes(put={"enrolments/server/hub.json": american.to_bytes()}))
    return made


@pytest.fixture
def server(world: FederationWorld) -> Iterator[str]:
    with world.server() as address:
        yield address


def rule(world: FederationWorld, name: str, text: str) -> None:
    """Put a ready-made module with a further rule into the charter."""
    world.change(Changes(put={f"policies/{name}.rego": (ready_made(name) + text).encode()}))


def run(world: FederationWorld, server: str, folder: Path, script: str = TRAIN) -> tuple[str, str]:
    """Run a job over both sites; its last status, and every reason and site state that its report gives."""
    bundle, model = make_job(folder, script, name="ruled", num_rounds=1)
    world.approve(bundle)
    with world.site(server, SITES[0]), world.site(server, SITES[1]), world.client(server) as client, model:
        job = client.submit(bundle, model, roster=None, recipients=[ADA])
        last = [event.text for event in client.watch(job, timeout=60) if event.kind == "status"][-1]
        report = client.report(job)
        return last, " | ".join([*report.reasons, *report.sites.values()])


def test_the_ready_made_rules_let_a_job_run(world: FederationWorld, server: str, tmp_path: Path) -> None:
    rule(world, "peers", "")
    rule(world, "export", "")
    assert run(world, server, tmp_path)[0] == "finished"


IN_EU = 'in_eu if input.to.jurisdiction in {"DE", "FR"}\n'


@pytest.mark.parametrize("kind", ["update", "metric", "log"])
def test_what_a_jurisdiction_rule_keeps_does_not_leave_the_site(
    world: FederationWorld, server: str, tmp_path: Path, kind: str
) -> None:
    """This data's updates (metrics, logged values) only to servers in these: the server stands elsewhere."""
    said = f"the {kind} of this hospital stays in the EU"
    body = f'input.from.name == "{HOSPITAL}"\n\tinput.kind == "{kind}"\n\tnot in_eu'
    rule(world, "export", f'\nreasons contains "{said}" if {{\n\t{body}\n}}\n\n{IN_EU}')
    status, told = run(world, server, tmp_path)
    assert status == "failed"
    assert f"policies/export.rego: {said}" in told
    assert not any("aggregated" in line for line in world.told)
    assert any(line.endswith(f"policies/export.rego: {said}") for line in world.told)


def test_a_result_that_may_not_leave_the_server_is_sealed_for_nobody(
    world: FederationWorld, server: str, tmp_path: Path
) -> None:
    said = "results stay with members in the EU"
    rule(world, "export", f'\nreasons contains "{said}" if {{\n\tinput.kind == "result"\n\tnot in_eu\n}}\n\n{IN_EU}')
    status, told = run(world, server, tmp_path)
    assert status == "failed"
    assert f"policies/export.rego: {said}" in told
    assert "result" not in [kind for kind, _ in world.ledger]


def test_a_peer_whose_role_may_not_call_is_refused(world: FederationWorld, server: str) -> None:
    text = ready_made("peers").replace('"server": {"gateway", "inner", "site"}', '"server": {"gateway"}')
    world.change(Changes(put={"policies/peers.rego": text.encode()}))
    with world.site(server, HOSPITAL) as running:
        assert isinstance(running.error, PeerRefused)
        assert "guests of these roles do not talk to each other" in str(running.error)
    assert not any(f"site {HOSPITAL} is connected" == line for line in world.told)


def test_a_connection_is_cut_when_the_rules_turn_against_it(world: FederationWorld, server: str) -> None:
    with world.site(server, HOSPITAL) as running:
        with world.client(server) as client:
            assert wait_until(lambda: client.reports().sites == (HOSPITAL,))
        rule(world, "peers", '\nreasons contains "sites stand in the EU" if input.here.role == "server"\n')
        assert wait_until(lambda: running.error is not None)
        assert "policies/peers.rego: sites stand in the EU" in str(running.error)
    assert any(f"site {HOSPITAL} is gone" in line and "sites stand in the EU" in line for line in world.told)


def test_each_side_asks_by_itself(world: FederationWorld, server: str) -> None:
    """A rule that only sites' guests evaluate: the server would take the site, the site turns away."""
    text = ready_made("peers").replace("jurisdictions := set()", 'jurisdictions := {"FR"}')
    text = text.replace(
        "jurisdiction_may if count(jurisdictions) == 0", 'jurisdiction_may if input.here.role == "server"'
    )
    world.change(Changes(put={"policies/peers.rego": text.encode()}))
    with world.site(server, HOSPITAL) as running:
        assert isinstance(running.error, PeerRefused)
        assert "jurisdictions named" in str(running.error)


def test_peers_are_judged_again_every_attestation_interval(
    world: FederationWorld, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that only time turns against a peer: no renewal, no change of the charter, no job comes in between."""
    consortium = world.charter().consortium.model_copy(update={"attestation_interval_seconds": 5})
    rule(world, "peers", '\nreasons contains "attested too long ago for us" if input.peer.age_seconds > 3\n')
    world.change(Changes(consortium=consortium))
    with world.site(server, HOSPITAL, identity=world.identity("site", HOSPITAL, seconds=60)) as running:
        assert running.error is None
        assert wait_until(lambda: running.error is not None, 12)
    assert isinstance(running.error, Refused)
    assert "attested too long ago for us" in str(running.error)


def test_a_script_that_logs_much_asks_once_a_round(
    world: FederationWorld, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fl.guard.export as gate

    asked: list[str] = []
    ask = gate.export_reasons

    def counted(*words: object, **more: object) -> tuple[str, ...]:
        asked.append(str(words[2]))
        return ask(*words, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gate, "export_reasons", counted)
    rule(world, "export", "")
    script = TRAIN.replace(
        "    flare.send(", "    [flare.log('x', 1.0, step=step) for step in range(200)]\n    flare.send(", 1
    )
    assert run(world, server, tmp_path, script)[0] == "finished"
    assert asked.count("log") <= 2 * 2  # two names of two lengths at two sites, not two hundred
    assert asked.count("result") == 1
