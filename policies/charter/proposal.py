"""Changing a charter: a proposal is one file that members sign offline, each on its own machine.

It holds the store that it changes, the new metadata (unsigned or partly signed) and the new files, so that a signer can
judge and read it without anything else. One round of signatures is enough: the snapshot pins the signed parts of the
roles, not their signatures. `propose_founding` or `propose` → `sign` by each → `publish` → `sign_timestamp` by brokers.
All are pure functions; `found` and `amend` do a whole round at once for those who hold the keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic import Field, ValidationError
from tuf.api.metadata import Root, Snapshot, T, Targets, Timestamp

from policies.charter.layout import metadata_file, target_file
from policies.charter.store import STORE_LIMIT
from policies.charter.trust import parse_metadata
from policies.devices import DeviceIssuer, TaskApproval
from policies.documents import BundleApproval, Document, Enrolment, ExportBudget, ImageReference, Text, User
from policies.errors import MalformedDocument
from policies.vaults import VaultRecovery

PROPOSAL_LIMIT: Final = 4 * STORE_LIMIT
"""Bytes of a proposal's file."""
TIMESTAMP_FILE: Final = metadata_file(Timestamp.type, 0)
FIRST_ROOT: Final = metadata_file(Root.type, 1)


@dataclass(frozen=True, slots=True)
class Proposal:
    """One proposed version of a charter. `base` is the store that it changes (empty: it founds one)."""

    note: str
    base: Mapping[str, bytes]
    metadata: Mapping[str, bytes]
    targets: Mapping[str, bytes]

    @property
    def version(self) -> int:
        """The charter's version that this proposal makes (its snapshot's)."""
        return next(version_of(name) for name in self.metadata if name.endswith(".snapshot.json"))

    @property
    def root(self) -> bytes:
        """The first root: of the base, or the one that the proposal founds."""
        return self.base.get(FIRST_ROOT) or self.metadata[FIRST_ROOT]

    def store(self) -> dict[str, bytes]:
        """Return the store as it will be: all roots, the new metadata, what is still listed, the old timestamp."""
        merged = {**self.base, **self.metadata, **self.targets}
        keep = {name for name in merged if name.endswith(".root.json")} | {TIMESTAMP_FILE}
        snapshot_name = metadata_file(Snapshot.type, self.version)
        keep.add(snapshot_name)
        for name, entry in parsed(Snapshot, snapshot_name, merged).meta.items():
            role_name = metadata_file(name.removesuffix(".json"), entry.version)
            keep.add(role_name)
            listing = parsed(Targets, role_name, merged).targets
            keep |= {target_file(path, target.hashes["sha256"]) for path, target in listing.items()}
        return {name: raw for name, raw in merged.items() if name in keep}


class ProposalFile(Document):
    """A proposal as it travels. The parts are text: metadata and documents are JSON, policies Rego or TOML."""

    sealwright_proposal: int = Field(ge=1, le=1)
    note: Text
    base: dict[str, str]
    metadata: dict[str, str]
    targets: dict[str, str]


def write_proposal(proposal: Proposal) -> bytes:
    """Return the bytes of the file that travels."""
    parts = {name: _texts(getattr(proposal, name)) for name in ("base", "metadata", "targets")}
    return ProposalFile(sealwright_proposal=1, note=proposal.note, **parts).to_bytes()


def _texts(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: raw.decode("utf-8") for name, raw in files.items()}


def parse_proposal(raw: bytes, where: str) -> Proposal:
    """Return the proposal in `raw`. Raises MalformedDocument if it is none; says nothing yet about who signed."""
    do = "Ask its author for the file again."
    if len(raw) > PROPOSAL_LIMIT:
        raise MalformedDocument(f"the proposal is larger than {PROPOSAL_LIMIT} bytes", where=where, do=do)
    try:
        file = ProposalFile.model_validate_json(raw)
    except ValidationError as error:
        raise MalformedDocument("this is not a proposal", where=where, do=do) from error
    if file.to_bytes() != raw:
        raise MalformedDocument("the proposal is not in canonical form (RFC 8785)", where=where, do=do)
    base, metadata, targets = (
        {name: text.encode("utf-8") for name, text in part.items()} for part in (file.base, file.metadata, file.targets)
    )
    proposal = Proposal(file.note, base, metadata, targets)
    try:
        proposal.store()
    except (StopIteration, KeyError, MalformedDocument) as error:
        raise MalformedDocument("the proposal is incomplete", where=where, do=do) from error
    return proposal


def path_of(document: Document) -> str:
    """Return the target path at which a document stands. Raises ValueError for one that stands in no file."""
    match document:
        case ImageReference():
            return f"images/{document.name}.json"
        case Enrolment():
            return f"enrolments/{document.role}/{document.name}.json"
        case VaultRecovery():
            return f"enrolments/vault-{document.role}/{document.name}.json"
        case DeviceIssuer():
            return f"enrolments/device-issuer/{document.name}.json"
        case BundleApproval():
            return f"code/{document.bundle}.json"
        case TaskApproval():
            return f"code/device-{document.task}.json"
        case User():
            return f"members/{document.member}/users/{document.name}.json"
        case ExportBudget():
            return f"members/{document.member}/budget/exports.json"
        case _:
            raise ValueError(f"a {type(document).__name__} is not a file of the charter")


def files_of(documents: Iterable[Document]) -> dict[str, bytes]:
    """Return documents as target files, path → bytes."""
    return {path_of(document): document.to_bytes() for document in documents}


def version_of(name: str) -> int:
    """Return the version in a metadata file's name; 0 if there is none."""
    number = name.removeprefix("metadata/").split(".")[0]
    return int(number) if number.isascii() and number.isdigit() and len(number) < 11 else 0


def newest_snapshot(store: Mapping[str, bytes]) -> int:
    """Return the highest version of a snapshot in `store`; 0 if there is none."""
    return max((version_of(name) for name in store if name.endswith(".snapshot.json")), default=0)


def parsed(kind: type[T], name: str, store: Mapping[str, bytes]) -> T:
    """Return the signed part of the metadata `name` in `store`. Raises MalformedDocument if it cannot be read."""
    metadata, _ = parse_metadata(kind, name, store.get(name, b""))
    if metadata is None:
        raise MalformedDocument("not readable as TUF metadata", where=name, do="Ask its author for the file again.")
    return metadata.signed
