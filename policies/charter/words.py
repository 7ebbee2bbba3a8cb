"""What a proposal changes, in plain words: what a signer reads before signing, and what `seal charter diff` prints."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cryptography.hazmat.primitives import hashes

from policies.charter.content import Charter
from policies.charter.layout import json_target, listed, resource_of
from policies.charter.trust import Shortfall
from policies.devices import DeviceIssuer, TaskApproval
from policies.documents import (
    Allowance,
    BundleApproval,
    Consortium,
    Document,
    Enrolment,
    ExportBudget,
    ImageReference,
    Split,
    User,
    format_time,
    load_certificate,
)
from policies.keys import fingerprint
from policies.vaults import VaultRecovery

_NUMBERS: Final = {
    "threshold": "members who must sign",
    "broker_threshold": "brokers who must sign the timestamp",
    "witness_threshold": "witnesses who must cosign a ledger",
    "lease_seconds": "lease of a credential, in seconds",
    "attestation_interval_seconds": "seconds between attestations",
    "credential_seconds": "lifetime of a credential's certificate, in seconds",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One change: a sentence, and lines that show it in full (a policy's text, a list)."""

    sentence: str
    details: tuple[str, ...] = ()


def differences(before: Charter | None, after: Charter) -> tuple[Change, ...]:
    """Return what `after` changes against `before` (None: it founds the charter), the most far-reaching first."""
    changes: list[Change] = []
    if before is None:
        changes.extend(_founding(after.consortium))
    else:
        changes.extend(_consortium(before.consortium, after.consortium))
    old: Mapping[str, bytes] = before.files if before else {}
    paths = sorted(set(old) | set(after.files))
    changes.extend(_file(path, before, after) for path in paths if old.get(path) != after.files.get(path))
    if before is not None:
        renewed = [role for role in after.versions if after.versions[role] > before.versions.get(role, 0)]
        if not changes:
            changes.append(Change(f"Renew {listed(set(renewed) - {'snapshot'})}: the same content, with a new expiry."))
        changes.extend(_other_digest(before, after))
    changes.extend(Change(f"Mind: {warning}.") for warning in after.warnings)
    return tuple(Change(visible(c.sentence), tuple(visible(line) for line in c.details)) for c in changes)


def visible(text: str) -> str:
    """Return `text` with whatever a terminal would act on, or hide, spelled out: control and format characters.

    A policy's comment could otherwise erase the lines above it from a signer's screen, or reorder what is read.
    """
    return "".join(letter if letter.isprintable() else _spelled(letter) for letter in text)


def _spelled(letter: str) -> str:
    return "    " if letter == "\t" else f"\\u{{{ord(letter):x}}}"


def _other_digest(before: Charter, after: Charter) -> list[Change]:
    if before.id == after.id:
        return []
    return [Change(f"These are different charters: {before.id[:16]}… and {after.id[:16]}….")]


def _founding(consortium: Consortium) -> list[Change]:
    members = consortium.members
    return [
        Change(
            f"Found the {consortium.platform} charter {consortium.name}, trust domain {consortium.trust_domain}: "
            f"any {consortium.threshold} of {len(members)} members decide together.",
            tuple(f"member {member.name}, key {_print(member.public_key)}" for member in members),
        ),
        *_thresholds(consortium),
        *(_broker_added(consortium, broker.name) for broker in consortium.brokers),
        *(
            Change(f"Witness {w.name} of {w.member}, at {w.url}, key {_print(w.public_key)}.")
            for w in consortium.witnesses
        ),
        *_witness_threshold(consortium),
        *(
            Change(f"Admit the virtual platform ({root.product}) with the root {root.ark_spki_sha256}.")
            for root in consortium.virtual_roots
        ),
    ]


def _thresholds(consortium: Consortium) -> list[Change]:
    own = consortium.thresholds.model_dump()
    return [Change(f"For {role}, {number} members must sign.") for role, number in own.items() if number is not None]


def _witness_threshold(consortium: Consortium) -> list[Change]:
    if consortium.witness_threshold == 0:
        return []
    return [Change(f"{consortium.witness_threshold} witnesses must cosign a broker's ledger before its answer leaves.")]


def _broker_added(consortium: Consortium, name: str) -> Change:
    broker = consortium.broker(name)
    if broker is None:
        raise ValueError(f"there is no broker {name}")
    return Change(f"Broker {name} of {broker.member}, at {broker.url}, key {_print(broker.signing_key)}.")


def _print(pem: str) -> str:
    return fingerprint(pem)[:32]


def _consortium(old: Consortium, new: Consortium) -> list[Change]:
    if old == new:
        return []
    changes = [*_members(old, new), *_brokers(old, new)]
    for field, words in _NUMBERS.items():
        if getattr(old, field) != getattr(new, field):
            changes.append(Change(f"Change the {words} from {getattr(old, field)} to {getattr(new, field)}."))
    for role, number in new.thresholds.model_dump().items():
        if getattr(old.thresholds, role) != number:
            now = new.threshold_for(role)
            changes.append(Change(f"For {role}, {old.threshold_for(role)} members had to sign; now {now} must."))
    changes.extend(
        Change(f"Change the {field.replace('_', ' ')}: {getattr(old, field)} → {getattr(new, field)}.")
        for field in ("name", "platform", "trust_domain")
        if getattr(old, field) != getattr(new, field)
    )
    for word, lists in (
        ("virtual root", (old.virtual_roots, new.virtual_roots)),
        ("witness", (old.witnesses, new.witnesses)),
    ):
        gone, come = ([item.model_dump_json() for item in part] for part in lists)
        changes.extend(Change(f"Remove the {word} {item}.") for item in gone if item not in come)
        changes.extend(Change(f"Add the {word} {item}.") for item in come if item not in gone)
    return changes


def _members(old: Consortium, new: Consortium) -> list[Change]:
    changes = []
    for member in old.members:
        now = new.member(member.name)
        if now is None:
            changes.append(Change(f"Member {member.name} leaves; its key decides nothing any more."))
            continue
        if now.jurisdiction != member.jurisdiction:
            places = f"{member.jurisdiction or 'nowhere'} to {now.jurisdiction or 'nowhere'}"
            changes.append(Change(f"Member {member.name} moves from {places}."))
        if now.public_key != member.public_key:
            changes.append(
                Change(
                    f"Member {member.name} gets another key.",
                    (f"until now {_print(member.public_key)}", f"from now on {_print(now.public_key)}"),
                )
            )
    changes.extend(
        Change(f"Member {member.name} joins, key {_print(member.public_key)}.")
        for member in new.members
        if old.member(member.name) is None
    )
    return changes


def _brokers(old: Consortium, new: Consortium) -> list[Change]:
    changes = []
    for broker in old.brokers:
        now = new.broker(broker.name)
        if now is None:
            changes.append(Change(f"Broker {broker.name} of {broker.member} is dismissed."))
            continue
        fields = _fields(broker.model_dump(mode="json"), now.model_dump(mode="json"))
        if fields:
            changes.append(Change(f"Broker {broker.name} changes.", tuple(fields)))
    changes.extend(_broker_added(new, broker.name) for broker in new.brokers if old.broker(broker.name) is None)
    return changes


def _file(path: str, before: Charter | None, after: Charter) -> Change:
    old = before.documents.get(path) if before else None
    new = after.documents.get(path)
    document = new or old
    if json_target(path) is not None and document is not None:
        verb = "Add" if old is None else "Withdraw" if new is None else "Change"
        details: Iterable[str] = _full(document)
        if old is not None and new is not None:
            details = _fields(old.model_dump(mode="json"), new.model_dump(mode="json"))
        return Change(f"{verb} {_describe(document)}.", tuple(details))
    was, now = (_text(charter, path) for charter in (before, after))
    verb = "Add" if was is None else "Remove" if now is None else "Change"
    resource = resource_of(path)
    what = f"the release policy of {resource}" if resource else f"the policy {path}"
    lines = difflib.unified_diff(
        (was or "").splitlines(), (now or "").splitlines(), "before", "after", lineterm="", n=2
    )
    return Change(f"{verb} {what}.", tuple(lines))


def _text(charter: Charter | None, path: str) -> str | None:
    raw = charter.files.get(path) if charter else None
    return None if raw is None else raw.decode("utf-8", "replace")


def _describe(document: Document) -> str:
    match document:
        case ImageReference():
            count = len(document.measurements)
            return (
                f"image {document.name} ({document.platform}, security version {document.svn}) for "
                f"{listed(document.roles)}, "
                f"with {count} measurement{'s' if count > 1 else ''}"
            )
        case Enrolment():
            chips = "any chip" if document.chips is None else f"{len(document.chips)} chips"
            return (
                f"the place of {document.role} {document.name} for {document.member}: image {document.image}, {chips}"
            )
        case BundleApproval(verdict="rejected"):
            return f"the rejection of a bundle for job {document.job}" + (
                f" ({document.note})" if document.note else ""
            )
        case BundleApproval():
            return (
                f"the approval of a bundle for job {document.job} at {listed(document.sites)} "
                f"until {format_time(document.expires)}"
                + (
                    ", without an export budget in bits, so that no site runs it"
                    if document.budget is None or document.budget.bits is None
                    else f", letting out {_allowed(document.budget)} of each member's sites"
                )
                + (f" ({document.note})" if document.note else "")
            )
        case DeviceIssuer():
            return (
                f"{document.name}, a key of {document.member}, which lets devices into the jobs "
                f"{listed(document.jobs)}, each for at most {document.token_seconds / 86400:.3g} days"
                + (f", but for {len(document.revoked)} that are revoked" if document.revoked else "")
            )
        case TaskApproval():
            return (
                f"the approval of a task that devices may run for job {document.job} "
                f"until {format_time(document.expires)}" + (f" ({document.note})" if document.note else "")
            )
        case ExportBudget():
            return f"the export budget of {document.member}: {_allowed(document)} over all jobs"
        case User():
            return f"user {document.name} of {document.member}, who may {listed(document.rights)}".replace(
                "may nobody", "do nothing yet"
            )
        case Split():
            return (
                f"how {document.resource} is split: any {document.k} of {listed(document.brokers)} join it "
                f"(generation {document.generation})"
            )
        case VaultRecovery():
            what = (
                f"its store of generation {document.generation}, whatever was committed after it"
                if document.generation
                else "nothing: it begins anew, and what it holds now is lost"
            )
            return (
                f"recovery {document.number} of the vault {document.vault}: {document.to_role} {document.to_name} goes "
                f"on from {what}"
            )
        case _:
            return type(document).__name__


def _allowed(allowance: Allowance) -> str:
    bounds = allowance.model_dump(include={"bits", "epsilon", "delta"})
    said = [
        f"{value} of {name}" if name != "bits" else f"{value} bits"
        for name, value in bounds.items()
        if value is not None
    ]
    return f"at most {listed(said)}" if said else "any amount"


def _full(document: Document) -> list[str]:
    """The digests and keys of a document in full: what a signer compares with what it was told elsewhere."""
    match document:
        case ImageReference():
            lines = [f"manifest {document.manifest_sha256}"]
            for item in document.measurements:
                features = f"guest features {item.guest_features:#x}"
                lines.append(f"{item.measurement} on {item.vcpu_model}, {item.vcpus} vCPUs, {item.vmm}, {features}")
            return lines
        case Enrolment():
            lines = [f"init-data {document.init_data_sha256}"]
            lines += [f"chip {chip}" for chip in document.chips or ()]
            lines += [f"address {document.address}"] if document.address else []
            return lines + ([f"in {document.jurisdiction}"] if document.jurisdiction else [])
        case BundleApproval():
            return [f"bundle {document.bundle}"]
        case TaskApproval():
            return [f"device task {document.task}"]
        case DeviceIssuer():
            revoked = [f"revoked device {device}" for device in document.revoked]
            return [f"signing key {fingerprint(document.signing_key)}", *revoked]
        case User():
            certificate = load_certificate(document.tls_certificate)
            return [
                f"signing key {_print(document.signing_key)}",
                f"TLS certificate {certificate.fingerprint(hashes.SHA256()).hex()}",
                f"results key {_digest(document.results_key)}",
            ]
        case Split():
            return [f"share of {broker} {digest}" for broker, digest in sorted(document.commitments.items())]
        case _:
            return []


def _fields(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Lines `field: before → after`; keys and certificates, which say nothing to a reader, by their first letters."""
    return [
        f"{field.replace('_', ' ')}: {_short(old.get(field))} → {_short(new.get(field))}"
        for field in new
        if old.get(field) != new.get(field)
    ]


def _short(value: Any) -> str:
    if isinstance(value, str) and value.startswith("-----BEGIN PUBLIC KEY"):
        return _print(value)
    if isinstance(value, str) and value.startswith("-----BEGIN CERTIFICATE"):
        return f"certificate {load_certificate(value).fingerprint(hashes.SHA256()).hex()}"
    text = str(value)
    return text if len(text) <= 1000 else f"{text[:1000]}… ({len(text)} letters, SHA-256 {_digest(text)})"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def standing(shortfalls: Iterable[Shortfall]) -> tuple[str, ...]:
    """Return whose signatures are still needed, one sentence for each group of roles that need the same."""
    groups: dict[tuple[tuple[str, ...], tuple[str, ...], int], list[str]] = {}
    for item in shortfalls:
        role = f"{item.role} (old keys)" if item.before else item.role
        groups.setdefault((item.may_sign, item.signed, item.needed), []).append(role)
    return tuple(
        f"{listed(roles)}: {len(signed)} of {needed} signatures"
        + (f" ({listed(signed)} signed)" if signed else "")
        + f"; {'still needed from' if needed > 1 else 'needed from'} {listed(set(may) - set(signed))}"
        for (may, signed, needed), roles in groups.items()
    )
