"""What a user says to the FL server, over one connection to the server as the charter and its EAR prove it."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

from pydantic import Field, TypeAdapter

from attestation.canonical import unb64
from attestation.errors import LedgerRefused
from attestation.ledger.checkpoint import parse_checkpoint
from attestation.ledger.entry import parse_entry
from attestation.ledger.receipt import check_receipt, parse_receipt
from fl.environments.kit import Kit
from fl.errors import ApprovalRefused, CallFailed, KitUnusable, MalformedMessage, StatementRefused
from fl.guard.approval import read_record
from fl.jobs.bundle import Bundle
from fl.jobs.command import SignedVerb, parse_command, sign_command
from fl.jobs.large_files import found_in
from fl.jobs.progress import JobEvent
from fl.jobs.record import JobRecord, parse_record, record_digest, sign_record
from fl.jobs.results import BEST_FILE, JOB_FILE, MODEL_FILE, rfc3339, write_file
from fl.jobs.sealing import open_result, seal_file_of_job, seal_first_model
from fl.jobs.statement import verify_statement
from fl.transport.channel import ServerConnection, connect, peer_error
from fl.transport.chunks import assemble, serve_chunks
from fl.transport.frames import (
    Frame,
    Happened,
    JobReport,
    Order,
    Origin,
    Places,
    Pull,
    Reports,
    Result,
    Submit,
    Verdict,
    adapter_of,
    pack,
    unpack,
)
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored
from policies.errors import SealwrightError

if TYPE_CHECKING:
    from attestation.ledger.cosignature import Ledger
    from policies.charter import Charter

T = TypeVar("T")

CALL_SECONDS: Final = 60.0
TRANSFER_SECONDS: Final = 3600.0
MAX_EVENTS_FILES: Final = 1 << 30
_PULL_OR_VERDICT: Final = TypeAdapter[Pull | Verdict](Annotated[Pull | Verdict, Field(discriminator="kind")])


class UserClient:
    """A user's connection to the FL server. `connected` makes one."""

    def __init__(self, kit: Kit, charter: Charter, at: datetime, connection: ServerConnection) -> None:
        self._kit = kit
        self._charter = charter
        self._connected_at = at, time.monotonic()
        self._connection = connection
        self._where = f"server {kit.file.server.name}"

    @classmethod
    @contextmanager
    def connected(cls, kit: Kit, charter: Charter, at: datetime) -> Iterator[UserClient]:
        """Connect to the kit's server and appraise it by `charter` at `at`. Raises PeerRefused, PeerLost."""
        server = kit.file.server
        with connect(
            server,
            server=server.name,
            tls_key=kit.tls_key,
            certificate_pem=kit.tls_certificate,
            charter=lambda: charter,
            clock=lambda: at,
        ) as connection:
            yield cls(kit, charter, at, connection)

    def submit(
        self,
        bundle: Bundle,
        model: SealedMemory,
        *,
        roster: Sequence[str] | None,
        recipients: Sequence[str],
        files: Mapping[str, Path] | None = None,
    ) -> str:
        """Submit a job; its id.

        `roster` None: all sites for which the bundle is approved. `files`: its large files, by digest.

        Raises ApprovalRefused if the bundle is not approved (before anything is sent), RecipeUnusable for a file that
        is not there, the server's own refusal with every reason, PeerLost.
        """
        approval = self._charter.bundle(bundle.digest)
        settings = bundle.settings
        job, created = self._new_job(settings.name)
        if approval is None:
            raise ApprovalRefused(job, (f"the bundle {bundle.digest} is not approved in the charter",))
        if self._kit.model_key is None:
            raise KitUnusable("the kit has no model.key: this user cannot seal first models", where="model.key")
        large, model_key = found_in(settings.files, files or {}), self._kit.model_key
        record = JobRecord(
            charter=self._charter.id,
            job=job,
            name=settings.name,
            bundle=bundle.digest,
            server=self._kit.file.server.name,
            roster=tuple(roster if roster is not None else approval.sites),
            recipients=tuple(recipients),
            rounds=settings.num_rounds,
            min_sites=settings.min_clients,
            model_sha256=model.digest,
            model_size=model.size,
            created=rfc3339(created),
            submitter=self._kit.user,
        )
        sealed = seal_first_model(model.view, model_key, job, random=os.urandom)
        head = Submit(
            record=sign_record(record, self._kit.signing_key), bundle_size=len(bundle.raw), model_size=len(sealed)
        )
        parts = (seal_file_of_job(file, digest, model_key, job, random=os.urandom) for digest, file in large.items())
        self._send(head, itertools.chain([bundle.raw, sealed], parts))
        return job

    def clone(self, job: str, *, roster: Sequence[str] | None = None, recipients: Sequence[str] | None = None) -> str:
        """Submit a job of this user's own once more, with the bundle and the first model that the server has; its id.

        `roster` and `recipients` None: as they were. Raises CommandRefused for another's job, ApprovalRefused as
        `submit`, PeerLost if the server does not keep the first model.
        """
        signed = read_record(self._ask_one("Origin", self._order("clone", job), Origin).record, self._charter)
        earlier = signed.record
        if earlier.job != job or earlier.submitter != self._kit.user:
            raise ApprovalRefused(job, ("the server shows the record of another job",))
        clone, created = self._new_job(earlier.name)
        changed = {
            "job": clone,
            "created": rfc3339(created),
            "roster": list(roster or earlier.roster),
            "recipients": list(recipients or earlier.recipients),
        }
        record = parse_record({**earlier.model_dump(mode="json"), **changed})
        self._send(Submit(record=sign_record(record, self._kit.signing_key), bundle_size=0, model_size=0, like=job), ())
        return clone

    def _new_job(self, name: str) -> tuple[str, datetime]:
        """The id of a new job, and now."""
        created = self._now()
        return f"{name[:60]}-{created:%Y%m%d-%H%M%S}-{os.urandom(4).hex()}", created

    def _send(self, head: Submit, parts: Iterable[bytes | Stored]) -> None:
        """Send a submission; its parts are made as they are sent."""
        pulled: SimpleQueue[bool] = SimpleQueue()

        def outgoing() -> Iterator[bytes]:
            yield pack(head)
            if pulled.get():
                for part in parts:
                    yield from serve_chunks(part)
                    if isinstance(part, Stored):
                        part.close()

        call = self._connection.call("Submit", outgoing(), timeout=TRANSFER_SECONDS)
        try:
            for raw in call:
                frame, _ = unpack(_PULL_OR_VERDICT, raw, where=self._where)
                if isinstance(frame, Verdict):
                    if not frame.accepted:
                        raise ApprovalRefused("(new)", frame.reasons or ("the server gave no reason",))
                    return
                pulled.put(True)
        except CallFailed as error:
            raise peer_error(error, where=self._where) from error
        finally:
            pulled.put(False)
            call.cancel()
        raise MalformedMessage("the server gave no verdict", where=self._where)

    def reports(self) -> Reports:
        """All jobs that the server knows, and the connected sites."""
        return self._ask_one("Jobs", self._order("list"), Reports)

    def report(self, job: str) -> JobReport:
        """A job's state."""
        return self._ask_one("Report", self._order("report", job), JobReport)

    def abort(self, job: str) -> None:
        """Stop a job. Raises Refused without the right to operate, unless it is the user's own."""
        self._ask_one("Abort", self._order("abort", job), Verdict)

    def delete(self, job: str) -> None:
        """Have the server forget a job that is over, its result included. Raises Refused as `abort` does."""
        self._ask_one("Delete", self._order("delete", job), Verdict)

    def reject(self, job: str, why: str = "") -> None:
        """Take the sites of the user's member out of a job, or keep them out. Raises Refused."""
        self._ask_one("Decide", self._order("reject", job, why), Verdict)

    def approve(self, job: str, why: str = "") -> None:
        """Take an earlier rejection by the user's member back, while the job has not begun. Raises Refused."""
        self._ask_one("Decide", self._order("approve", job, why), Verdict)

    def places(self) -> Places:
        """The server and the charter's sites, as the server sees them."""
        return self._ask_one("Places", self._order("list"), Places)

    def restart(self, place: str) -> None:
        """Have a site, or the server, end what it does and start anew. Raises Refused, PeerLost."""
        self._ask_one("Steer", self._order("restart", place=place), Verdict)

    def stop(self, place: str) -> None:
        """Have a site, or the server, stop. Raises Refused, PeerLost."""
        self._ask_one("Steer", self._order("stop", place=place), Verdict)

    def watch(self, job: str, *, timeout: float | None = None) -> Iterator[JobEvent]:
        """A job's events from its beginning until it is over. Raises PeerLost when the time is up."""
        call = self._connection.ask("Watch", self._order("watch", job), timeout=timeout)
        try:
            for raw in call:
                frame, _ = unpack(adapter_of(Happened), raw, where=self._where)
                yield frame.event
        except CallFailed as error:
            raise peer_error(error, where=self._where) from error
        finally:
            call.cancel()

    def download(self, job: str, folder: Path, *, ledgers: Mapping[str, Ledger] | None) -> Path:
        """Download, verify and open a job's result into `folder`, which is made.

        `ledgers` are the keys of the ledgers, by origin, in one of which the statement has to be (None: not asked for).
        Nothing is written unless everything holds: the record's signature, the statement by an attested server, its
        place in the ledger, every digest. Raises StatementRefused, ApprovalRefused, LedgerRefused.
        """
        call = self._connection.ask("Download", self._order("download", job), timeout=TRANSFER_SECONDS)
        try:
            frames = iter(call)
            head, _ = unpack(adapter_of(Result), next(frames), where=self._where)
            signed = read_record(head.record, self._charter)
            if signed.record.job != job or self._kit.user not in signed.record.recipients:
                raise StatementRefused(job, ("its record is of another job, or names other recipients",))
            limit = 2 * signed.record.model_size + MAX_EVENTS_FILES  # the last model, and perhaps the best one
            if not 0 < head.size <= limit:
                raise MalformedMessage(f"the result has {head.size} bytes, more than {limit}", where=self._where)
            statement = verify_statement(head.statement, signed.record, self._charter, self._now())
            if statement.record_sha256 != record_digest(head.record):
                raise StatementRefused(job, ("its record is not the one that the server ran",))
            with assemble(frames, size=head.size, sha256=statement.result_sha256, where="result") as memory:
                payload = bytes(memory.view)
        except StopIteration as error:
            raise MalformedMessage("the server sent no result", where=self._where) from error
        except CallFailed as error:
            raise peer_error(error, where=self._where) from error
        finally:
            call.cancel()
        if ledgers is not None:
            check_logged(head, ledgers)
        sealed_key = unb64(head.sealed_key, where="result")
        files = open_result(payload, sealed_key, self._kit.results_key, job, self._kit.user, max_bytes=limit)
        if hashlib.sha256(files.get(MODEL_FILE, b"")).hexdigest() != statement.model_sha256:
            raise StatementRefused(job, ("its model is not the one that the statement names",))
        for name, data in files.items():
            target = folder / name if name in {MODEL_FILE, BEST_FILE, JOB_FILE} else folder / "events" / name
            write_file(target, data)
        folder.chmod(0o700)
        proof = {"record": head.record, **head.statement.model_dump(mode="json")}
        write_file(folder / "statement.json", json.dumps(proof, indent=2).encode())
        if head.receipt:
            write_file(folder / "receipt.json", head.receipt.encode())
        return folder

    def _now(self) -> datetime:
        """The broker's time when the connection was made, and what has passed since."""
        at, mark = self._connected_at
        return at + timedelta(seconds=time.monotonic() - mark)

    def _order(self, verb: SignedVerb, job: str | None = None, why: str = "", place: str | None = None) -> Order:
        """The user's signed command. Raises MalformedMessage for what is no job's id and no place's name."""
        command = {
            "charter": self._charter.id,
            "server": self._kit.file.server.name,
            "command": verb,
            "job": job,
            "place": place,
            "user": self._kit.user,
            "created": rfc3339(self._now()),
            "nonce": os.urandom(16).hex(),
            "why": why,
        }
        return Order(command=sign_command(parse_command(command), self._kit.signing_key))

    def _ask_one(self, method: str, frame: Frame, kind: type[T]) -> T:
        call = self._connection.ask(method, frame, timeout=CALL_SECONDS)
        try:
            answer, _ = unpack(adapter_of(kind), next(iter(call)), where=self._where)
        except StopIteration as error:
            raise MalformedMessage("the server gave no answer", where=self._where) from error
        except CallFailed as error:
            raise peer_error(error, where=self._where) from error
        finally:
            call.cancel()
        return answer


def check_logged(head: Result, ledgers: Mapping[str, Ledger]) -> None:
    """Check that the result's statement is in one of these ledgers. Raises LedgerRefused."""
    where = "receipt"
    try:
        document = json.loads(head.receipt)
        entry = document["entry"].encode()
        receipt = parse_receipt(document["receipt"])
        origin = parse_checkpoint(receipt.checkpoint).origin
        if origin not in ledgers:
            raise LedgerRefused((f"the receipt is of {origin[:100]!r}, no broker's ledger",), where=where)
        check_receipt(receipt, entry, ledgers[origin])
        found = parse_entry(entry)
        logged = found.body["document"]["statement"]
    except SealwrightError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LedgerRefused(("the server shows no ledger entry for the result",), where=where) from error
    if found.kind != "result" or logged != head.statement.statement:
        raise LedgerRefused(("the ledger entry is about another result",), where=where)
