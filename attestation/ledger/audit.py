"""Checking an audit bundle offline, from the charter's first root that the auditor brings and nothing else.

1. Each charter that was followed is verified from that root, as it was logged; it gives the broker's keys.
2. The signed head is that broker's, and as many witnesses as the newest charter demands have cosigned it; the tree
   over the entries is the head's; each receipt is the one it implies.
3. Every file is accounted for, every blob is what its name says.
4. Every decision is made again from what stands behind it: evidence is appraised, policies are evaluated, counters are
   counted, signatures of owners and issuers are checked (attestation.ledger.retrial).

All problems are reported, each with the file it is in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from attestation.canonical import format_time, read_canonical
from attestation.jws import ed25519_public_key
from attestation.ledger.bundle import (
    CHECKPOINT,
    MAX_FILE,
    blob_file,
    blob_references,
    charter_folder,
    entry_file,
    file_limit,
    list_bundle,
    read_file,
    receipt_file,
    strays,
)
from attestation.ledger.checkpoint import Checkpoint, ledger_origin, open_checkpoint, parse_checkpoint
from attestation.ledger.cosignature import ledger_of, open_cosigned
from attestation.ledger.entry import Entry, parse_entry
from attestation.ledger.receipt import Receipt, parse_receipt
from attestation.ledger.retrial import Decision, Retrial
from attestation.ledger.tree import MemoryTree, inclusion_proof, leaf_hash, verify_inclusion
from policies.charter import Charter, load_charter
from policies.charter.signing import current_charter
from policies.documents import BrokerEntry, Consortium
from policies.errors import Refused, SealwrightError

MAX_MISSING: Final = 1000
"""How many missing entries are named one by one."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong, and in which file of the bundle."""

    file: str
    reason: str


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What an audit found."""

    problems: tuple[Problem, ...]
    entries: int
    kinds: Mapping[str, int]
    broker: str | None
    charter: str
    version: int | None
    platform: str | None
    first: datetime | None
    last: datetime | None
    decisions: tuple[Decision, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """As `seal audit verify --json` prints it."""
        return {
            "status": "affirming" if self.ok else "contraindicated",
            "problems": [{"file": problem.file, "reason": problem.reason} for problem in self.problems],
            "broker": self.broker,
            "charter": {"id": self.charter, "version": self.version},
            "platform": self.platform,
            "entries": self.entries,
            "kinds": dict(self.kinds),
            "first": format_time(self.first) if self.first else None,
            "last": format_time(self.last) if self.last else None,
            "decisions": [decision.to_json() for decision in self.decisions],
        }


@dataclass(slots=True)
class _Audit:
    root: bytes
    files: dict[str, Path]
    problems: list[Problem] = field(default_factory=list)
    known: set[str] = field(default_factory=set)
    raw: dict[int, bytes] = field(default_factory=dict)
    entries: dict[int, Entry] = field(default_factory=dict)
    charters: dict[int, Charter] = field(default_factory=dict)
    consortium: Consortium | None = None

    def problem(self, file: str, reason: str) -> None:
        self.problems.append(Problem(file, reason))

    def read(self, name: str) -> bytes | None:
        """A file's bytes; a missing or unreadable one is a problem."""
        self.known.add(name)
        if name not in self.files:
            self.problem(name, "it is missing")
            return None
        try:
            return read_file(self.files[name], file_limit(name))
        except SealwrightError as error:
            self.problem(name, error.what)
            return None

    # --- entries and charters ---------------------------------------------------------------------------------------

    def read_entries(self) -> None:
        """Read the entries that are there."""
        for name in self.files:
            if not _is_entry(name):
                continue
            raw, number = self.read(name), int(name[8:16])
            if raw is None:
                continue
            self.raw[number] = raw
            try:
                self.entries[number] = parse_entry(raw)
            except SealwrightError as error:
                self.problem(name, error.what)

    def find_consortium(self) -> None:
        """Take the brokers' keys from the newest charter in the bundle that the trusted root vouches for."""
        folders = {"/".join(name.split("/")[:2]) for name in self.files if name.startswith("charter/")}
        for folder in sorted(folders, key=_charter_order, reverse=True):
            store = {}
            for name, path in self.files.items():
                if name.startswith(f"{folder}/"):
                    try:
                        store[name.removeprefix(f"{folder}/")] = read_file(path, MAX_FILE)
                    except SealwrightError:
                        continue  # told where it is accounted for
            try:
                self.consortium = current_charter(store, self.root).consortium
            except SealwrightError:
                continue  # a damaged one is named where it is accounted for; another may do
            return
        self.problem("charter", "the bundle holds no charter that can be verified from the root that you trust")

    def read_charters(self, good: set[int]) -> None:
        """Verify each charter that the good entries name, in their order."""
        known: Charter | None = None
        for number in sorted(good):
            entry = self.entries.get(number)
            if entry is None or entry.kind != "charter":
                continue
            try:
                charter = self._charter(number, entry, known)
            except (KeyError, TypeError, AttributeError):
                self.problem(entry_file(number), "it does not name a charter's files")
                continue
            if charter is not None:
                known = self.charters[number] = charter

    def _charter(self, number: int, entry: Entry, known: Charter | None) -> Charter | None:
        folder = charter_folder(entry)
        store: dict[str, bytes] = {}
        whole = True
        for name, digest in entry.body["files"].items():
            raw = self.read(f"{folder}/{name}")
            if raw is None:
                whole = False
                continue
            if sha256(raw).hexdigest() != digest:
                self.problem(f"{folder}/{name}", "it is not the file that was logged")
                whole = False
            store[name] = raw
        if not whole:
            return None
        try:
            charter = load_charter(store, self.root, entry.time, known=known)
        except Refused as error:
            for reason in error.reasons:
                self.problem(folder, reason)
            return None
        said = {"id": charter.id, "version": charter.version}
        if entry.body["charter"] != said or entry.body["timestamp"] != charter.versions["timestamp"]:
            self.problem(entry_file(number), "it names another charter version than its files are")
        return charter

    # --- the tree ---------------------------------------------------------------------------------------------------

    def check_tree(self) -> tuple[BrokerEntry | None, set[int]]:
        """Check head, entries and receipts; return the broker and the entries that are as they were logged."""
        head, note = self._head()
        receipts = {number: self._receipt(number) for number in sorted(self.raw)}
        for receipt in receipts.values():
            if head is None and receipt is not None and (head := self._opened(receipt.checkpoint)) is not None:
                note = receipt.checkpoint
        if head is None or self.consortium is None:
            return None, set()
        self._check_cosignatures(head, note)
        for number in sorted(self.raw):
            if number >= head.size:
                self.problem(entry_file(number), "it is beyond the signed head")
        missing = [number for number in range(min(head.size, len(self.raw) + MAX_MISSING)) if number not in self.raw]
        for number in missing[:MAX_MISSING]:
            self.problem(entry_file(number), "it is missing")
            self.known.add(receipt_file(number))
        good = self._whole_tree(head, note, receipts) if not missing else None
        if good is None:
            good = self._single_proofs(head, receipts)
        return self.consortium.broker(_broker_of(head.origin)), good

    def _check_cosignatures(self, head: Checkpoint, note: str) -> None:
        """The newest charter in the bundle says how many witnesses must have cosigned the head."""
        broker = self.consortium.broker(_broker_of(head.origin)) if self.consortium else None
        if self.consortium is None or broker is None:
            return
        try:
            open_cosigned(note, ledger_of(self.consortium, broker))
        except SealwrightError as error:
            self.problem(CHECKPOINT, error.what)

    def _whole_tree(self, head: Checkpoint, note: str, receipts: Mapping[int, Receipt | None]) -> set[int] | None:
        """If the entries make the signed tree, all are good, and each receipt must be the one that the tree implies."""
        tree = MemoryTree()
        for number in range(head.size):
            tree.append(self.raw[number])
        if tree.root() != head.root:
            return None
        for number in range(head.size):
            expected = Receipt(number, note, tuple(inclusion_proof(number, head.size, tree.read)))
            if receipts[number] is not None and receipts[number] != expected:
                self.problem(receipt_file(number), "it is not this entry's receipt under the signed head")
        return set(range(head.size))

    def _single_proofs(self, head: Checkpoint, receipts: Mapping[int, Receipt | None]) -> set[int]:
        """The entries that their own receipts show in the signed tree; the others are named."""
        good = set()
        for number, raw in sorted(self.raw.items()):
            receipt = receipts[number]
            if receipt is not None and verify_inclusion(number, head.size, leaf_hash(raw), receipt.proof, head.root):
                good.add(number)
            elif number < head.size:
                self._blame(entry_file(number), "it is not the entry that was logged here")
        return good

    def incomplete(self) -> bool:
        """Whether an entry is missing."""
        return any(problem.file.startswith("entries/") for problem in self.problems)

    def _blame(self, file: str, reason: str) -> None:
        if not any(problem.file == file for problem in self.problems):
            self.problem(file, reason)

    def _head(self) -> tuple[Checkpoint | None, str]:
        raw = self.read(CHECKPOINT)
        if raw is None:
            return None, ""
        try:
            note = raw.decode("utf-8")
            parse_checkpoint(note)
        except (UnicodeDecodeError, SealwrightError):
            self.problem(CHECKPOINT, "this is no signed checkpoint")
            return None, ""
        head = self._opened(note)
        if head is None and self.consortium is not None:
            self.problem(CHECKPOINT, "it is not signed by a broker of the charter that you trust")
        return head, note

    def _opened(self, note: str) -> Checkpoint | None:
        if self.consortium is None:
            return None
        try:
            name = _broker_of(parse_checkpoint(note).origin)
            broker = self.consortium.broker(name)
            if broker is None:
                return None
            origin = ledger_origin(self.consortium.trust_domain, name)
            return open_checkpoint(note, origin, _key(broker))
        except SealwrightError:
            return None

    def _receipt(self, number: int) -> Receipt | None:
        raw = self.read(receipt_file(number))
        if raw is None:
            return None
        try:
            return parse_receipt(read_canonical(raw, where="receipt", limit=MAX_FILE))
        except SealwrightError as error:
            self.problem(receipt_file(number), error.what)
            return None

    # --- blobs ------------------------------------------------------------------------------------------------------

    def read_blobs(self, good: set[int]) -> dict[str, bytes]:
        """Read every blob that a good entry names, checked by its name."""
        blobs: dict[str, bytes] = {}
        for number in sorted(good):
            entry = self.entries.get(number)
            for digest in blob_references(entry) if entry else []:
                name = blob_file(digest)
                if name in self.known:
                    continue
                raw = self.read(name)
                if raw is None:
                    continue
                if sha256(raw).hexdigest() != digest:
                    self.problem(name, "it is not what its name says")
                else:
                    blobs[digest] = raw
        return blobs

    def check_strays(self, all_entries_good: bool) -> None:
        """Every file must be accounted for; beside a damaged entry, blobs are at least what their names say."""
        for name in strays(self.files, self.known):
            if not all_entries_good and name.startswith(("blobs/", "charter/")):
                if name.startswith("blobs/"):
                    raw = self.read(name)
                    if raw is not None and f"blobs/{sha256(raw).hexdigest()}" != name:
                        self.problem(name, "it is not what its name says")
                continue
            self.problem(name, "it is foreign: nothing in the ledger accounts for it")


def verify_audit(folder: Path, root: bytes) -> AuditReport:
    """Check the bundle in `folder` from the charter's first root (bytes of 1.root.json).

    Raises Unusable if there is no bundle there at all; whatever is wrong in it is in the report.
    """
    files, odd = list_bundle(folder)
    audit = _Audit(root, files)
    for name, why in odd:
        audit.problem(name, why)
    audit.read_entries()
    audit.find_consortium()
    broker, good = audit.check_tree()
    audit.read_charters(good)
    blobs = audit.read_blobs(good)
    audit.check_strays(all_entries_good=not audit.incomplete())
    kinds: dict[str, int] = {}
    for entry in audit.entries.values():
        kinds[entry.kind] = kinds.get(entry.kind, 0) + 1
    retrial = Retrial(broker, audit.charters, blobs)
    if broker is not None:
        for number in sorted(good):
            found = audit.entries.get(number)
            for reason in retrial.judge(number, found) if found else ():
                audit.problem(entry_file(number), reason)
    times = [entry.time for _, entry in sorted(audit.entries.items())]
    newest = max(audit.charters, default=None)
    return AuditReport(
        problems=tuple(dict.fromkeys(audit.problems)),
        entries=len(audit.raw),
        kinds=kinds,
        broker=broker.name if broker else None,
        charter=sha256(root).hexdigest(),
        version=None if newest is None else audit.charters[newest].version,
        platform=audit.consortium.platform if audit.consortium else None,
        first=times[0] if times else None,
        last=times[-1] if times else None,
        decisions=tuple(retrial.decisions),
    )


def _charter_order(folder: str) -> tuple[int, ...]:
    parts = folder.removeprefix("charter/").split(".")
    return tuple(int(part) for part in parts) if all(map(str.isdecimal, parts)) else ()


def _is_entry(name: str) -> bool:
    return len(name) == 21 and name.startswith("entries/") and name.endswith(".json") and name[8:16].isdecimal()


def _broker_of(origin: str) -> str:
    parts = origin.split("/")
    return parts[2] if len(parts) == 4 and parts[1] == "broker" and parts[3] == "ledger" else ""


def _key(broker: BrokerEntry) -> Ed25519PublicKey:
    return ed25519_public_key(broker.signing_key)
