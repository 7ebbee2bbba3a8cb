"""What a verified charter says: typed documents out of verified files."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from policies.charter.layout import MEMBER_ROLE, json_target, rego_package, release_path, role_of, split_path
from policies.devices import DeviceIssuer, TaskApproval
from policies.documents import (
    BrokerEntry,
    BundleApproval,
    Consortium,
    Document,
    Enrolment,
    ExportBudget,
    ImageReference,
    Resource,
    Split,
    User,
    parse_document,
    user_complaints,
)
from policies.errors import MalformedDocument
from policies.vaults import VaultRecovery, vault_place

POLICY_LIMIT: Final = 256 * 1024
"""Bytes of one Rego module or appraisal profile."""
_PACKAGE: Final = re.compile(r"\s*(?:#[^\n]*\n\s*)*package[ \t]+([A-Za-z_][A-Za-z0-9_.]*)[ \t]*(?:#[^\n]*)?(?:\n|$)")


@dataclass(frozen=True, slots=True)
class Charter:
    """A charter that was verified at one moment. Made by `load_charter` alone.

    `id` is the SHA-256 (hex) of the bytes of 1.root.json; `version` is the snapshot's, `versions` has every TUF role's
    and `digests` the SHA-256 of each role's signed part (both serve as the floor for the next load); `expires` is the
    first moment at which any part lapses. `files` are the verified targets. `warnings` tell what is odd yet harmless:
    places that name what the charter no longer has, members whose own role has lapsed (their files are left out).
    """

    id: str
    version: int
    consortium: Consortium
    expires: datetime
    files: Mapping[str, bytes]
    versions: Mapping[str, int]
    digests: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    documents: Mapping[str, Document] = field(default_factory=dict, repr=False)

    def images(self) -> tuple[ImageReference, ...]:
        """Return the approved images, by name."""
        return tuple(document for document in self.documents.values() if isinstance(document, ImageReference))

    def image(self, name: str) -> ImageReference | None:
        """Return the approved image called `name`, or None."""
        document = self.documents.get(f"images/{name}.json")
        return document if isinstance(document, ImageReference) else None

    def image_by_measurement(self, measurement: str) -> ImageReference | None:
        """Return the approved image that has this launch measurement (96 hex digits), or None."""
        return next((i for i in self.images() if any(m.measurement == measurement for m in i.measurements)), None)

    def enrolments(self) -> tuple[Enrolment, ...]:
        """Return all enrolments, by role and name."""
        return tuple(document for document in self.documents.values() if isinstance(document, Enrolment))

    def enrolment(self, role: str, name: str) -> Enrolment | None:
        """Return the place that is granted to `name` in `role`, or None."""
        document = self.documents.get(f"enrolments/{role}/{name}.json")
        return document if isinstance(document, Enrolment) else None

    def bundle(self, digest: str) -> BundleApproval | None:
        """Return the approval of the bundle with this digest, or None. The caller compares `.expires` to its time."""
        document = self.verdict(digest)
        return document if document is not None and document.verdict == "approved" else None

    def verdict(self, digest: str) -> BundleApproval | None:
        """Return what was decided about the bundle with this digest, approval or rejection, or None."""
        document = self.documents.get(f"code/{digest}.json")
        return document if isinstance(document, BundleApproval) else None

    def bundles(self) -> tuple[BundleApproval, ...]:
        """Return all approvals of bundles, by digest."""
        return tuple(document for document in self.documents.values() if isinstance(document, BundleApproval))

    def device_issuer(self, name: str) -> DeviceIssuer | None:
        """Return who issues devices' tokens under this name, or None."""
        document = self.documents.get(f"enrolments/device-issuer/{name}.json")
        return document if isinstance(document, DeviceIssuer) else None

    def device_task(self, digest: str) -> TaskApproval | None:
        """Return the approval of the device task with this digest, or None. The caller compares `.expires`."""
        document = self.documents.get(f"code/device-{digest}.json")
        return document if isinstance(document, TaskApproval) else None

    def export_budget(self, member: str) -> ExportBudget | None:
        """Return what the sites of `member` may let out over all jobs, or None if it has set no bound."""
        document = self.documents.get(f"members/{member}/budget/exports.json")
        return document if isinstance(document, ExportBudget) else None

    def users(self) -> tuple[User, ...]:
        """Return all members' users, by member and name."""
        return tuple(document for document in self.documents.values() if isinstance(document, User))

    def user(self, member: str, name: str) -> User | None:
        """Return the user `name` of `member`, or None."""
        document = self.documents.get(f"members/{member}/users/{name}.json")
        return document if isinstance(document, User) else None

    def release_policy(self, resource: Resource) -> str | None:
        """Return the owner's Rego module for `resource`, or None: then nothing releases it."""
        path = release_path(resource)
        raw = self.files.get(path) if path else None
        return None if raw is None else raw.decode("utf-8")

    def split(self, resource: Resource) -> Split | None:
        """Return how `resource` is split over brokers, or None if it is whole."""
        path = split_path(resource)
        document = self.documents.get(path) if path else None
        return document if isinstance(document, Split) else None

    def splits(self) -> tuple[Split, ...]:
        """Return all split resources, by member, type and tag."""
        return tuple(document for document in self.documents.values() if isinstance(document, Split))

    def recovery(self, vault: Resource) -> VaultRecovery | None:
        """Return the members' last word on recovering `vault`, or None."""
        place = vault_place(vault)
        document = None if place is None else self.documents.get(f"enrolments/vault-{place[0]}/{place[1]}.json")
        return document if isinstance(document, VaultRecovery) and document.vault == vault else None

    def recoveries(self) -> tuple[VaultRecovery, ...]:
        """Return all recoveries of vaults, by role and name of the vault."""
        return tuple(document for document in self.documents.values() if isinstance(document, VaultRecovery))

    def policy(self, name: str) -> str | None:
        """Return the text of `policies/NAME` ("floor.rego", "admission.rego", "appraisal.toml"), or None."""
        raw = self.files.get(f"policies/{name}")
        return None if raw is None else raw.decode("utf-8")

    def broker(self, name: str) -> BrokerEntry | None:
        """Return the broker called `name`, or None."""
        return self.consortium.broker(name)


def rego_complaint(raw: bytes, package: str) -> str | None:
    """Return why `raw` is not the text of a Rego module of `package`, or None. Syntax is the evaluator's to judge."""
    if len(raw) > POLICY_LIMIT:
        return f"larger than {POLICY_LIMIT} bytes"
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return "not UTF-8 text"
    found = _PACKAGE.match(text)
    if not found:
        return "does not begin with its `package`"
    return None if found[1] == package else f"is of package {found[1]}, must be of {package}"


def read_documents(files: Mapping[str, bytes], consortium: Consortium) -> tuple[dict[str, Document], list[str]]:
    """Return the typed documents in `files` (sorted by path) and every reason why some are not what they must be."""
    documents: dict[str, Document] = {}
    reasons: list[str] = []
    for path in sorted(files):
        complaint = file_complaints(path, files[path], consortium, documents)
        reasons.extend(complaint)
    reasons.extend(_ambiguous_measurements(documents))
    return documents, reasons


def file_complaints(path: str, raw: bytes, consortium: Consortium, documents: dict[str, Document]) -> list[str]:
    """Judge one target by its path, keeping its document (if it is one) in `documents`; return every complaint."""
    role = role_of(path)
    if role is None:
        return [f"{path}: no file of a charter stands here"]
    if role.startswith(MEMBER_ROLE) and consortium.member(role.removeprefix(MEMBER_ROLE)) is None:
        return [f"{path}: {role.removeprefix(MEMBER_ROLE)} is not a member"]
    package = rego_package(path)
    if package is not None:
        complaint = rego_complaint(raw, package)
        return [] if complaint is None else [f"{path}: {complaint}"]
    target = json_target(path)
    if target is None:
        return _toml_complaints(path, raw)
    kind, words = target
    try:
        document = parse_document(kind, raw, path)
    except MalformedDocument as error:
        return [f"{path}: {error.what}"]
    documents[path] = document
    said: dict[str, Any] = document.model_dump(include=set(words))
    complaints = [f"{path}: says {key} {said[key]}" for key, value in words.items() if said[key] != value]
    return complaints + _against_consortium(path, document, consortium)


def _toml_complaints(path: str, raw: bytes) -> list[str]:
    if len(raw) > POLICY_LIMIT:
        return [f"{path}: larger than {POLICY_LIMIT} bytes"]
    try:
        tomllib.loads(raw.decode("utf-8"))
    except (UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        return [f"{path}: not valid TOML: {error}"]
    return []


def _against_consortium(path: str, document: Document, consortium: Consortium) -> list[str]:
    if isinstance(document, ImageReference) and document.platform != consortium.platform:
        return [f"{path}: an image for {document.platform} in a {consortium.platform} charter"]
    if isinstance(document, Enrolment | VaultRecovery | DeviceIssuer) and consortium.member(document.member) is None:
        return [f"{path}: {document.member} is not a member"]
    if isinstance(document, User):
        return user_complaints(document, consortium.trust_domain)
    if isinstance(document, Split) and vault_place(document.resource) is not None:
        return [f"{path}: {document.resource} is a vault's key, which its guest deals out, and no owner"]
    if isinstance(document, Split):
        return [f"{path}: {complaint}" for complaint in split_complaints(document, consortium)]
    return []


def split_complaints(document: Split, consortium: Consortium) -> list[str]:
    """Why a split is none: a member that runs as many of the brokers as join has the whole resource."""
    runs = [broker.member for broker in consortium.brokers if broker.name in document.brokers]
    return [
        f"{member} runs {runs.count(member)} of its brokers, and {document.k} shares are the whole"
        for member in sorted(set(runs))
        if runs.count(member) >= document.k
    ]


def _ambiguous_measurements(documents: Mapping[str, Document]) -> list[str]:
    owners: dict[str, set[str]] = {}
    for document in documents.values():
        if isinstance(document, ImageReference):
            for reference in document.measurements:
                owners.setdefault(reference.measurement, set()).add(document.name)
    return [
        f"images {', '.join(sorted(names))} claim the same measurement {measurement[:16]}…"
        for measurement, names in sorted(owners.items())
        if len(names) > 1
    ]


def loose_ends(
    documents: Mapping[str, Document], files: Mapping[str, bytes], consortium: Consortium | None = None
) -> list[str]:
    """Return what in the charter names things that it does not have: harmless (it grants nothing), yet odd."""
    ends: list[str] = []
    for path, document in documents.items():
        if isinstance(document, Enrolment):
            image = documents.get(f"images/{document.image}.json")
            if not isinstance(image, ImageReference):
                ends.append(f"{path}: its image {document.image} is not approved")
            elif document.role not in image.roles:
                ends.append(f"{path}: its image {document.image} is not approved for the role {document.role}")
        if isinstance(document, BundleApproval):
            ends.extend(
                f"{path}: its site {site} is not enrolled"
                for site in document.sites
                if not any(f"enrolments/{role}/{site}.json" in documents for role in ("site", "inner", "gateway"))
            )
        if isinstance(document, VaultRecovery):
            place = f"enrolments/{document.to_role}/{document.to_name}.json"
            ends += [] if place in documents else [f"{path}: {document.to_role} {document.to_name} is not enrolled"]
        if isinstance(document, Split) and consortium is not None:
            ends.extend(
                f"{path}: its broker {broker} is no broker of the charter; share it anew"
                for broker in document.brokers
                if consortium.broker(broker) is None
            )
    if consortium is not None and consortium.witness_threshold:
        needed = consortium.witness_threshold
        ends.extend(
            f"witness_threshold: {needed} of {others} witnesses can cosign one ledger of {broker.name} and as many "
            "others another one; more than half of them could not"
            for broker in consortium.brokers
            if 2 * needed <= (others := len(consortium.witnesses_of(broker)))
        )
    ends.extend(f"policies/{name} is missing" for name in ("floor.rego",) if f"policies/{name}" not in files)
    return ends
