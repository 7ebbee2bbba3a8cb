"""The end of a job: its result sealed to whom the charter lets have it, with a statement that is signed and logged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from attestation.canonical import unb64
from fl.errors import ApprovalRefused
from fl.guard.export import ExportGate
from fl.jobs.progress import Status
from fl.jobs.record import record_digest
from fl.jobs.results import BEST_FILE, JOB_FILE, MODEL_FILE, JobHistory, rfc3339
from fl.jobs.sealing import SealedResult, seal_result
from fl.jobs.statement import SignedStatement, Statement, sign_statement

if TYPE_CHECKING:
    from fl.guard.approval import SignedRecord
    from fl.party import Party
    from fl.tensors import Buffer
    from fl.transport.spool import Spool
    from fl.transport.stored import Stored


def seal_outcome(
    party: Party,
    server: str,
    signed: SignedRecord,
    history: JobHistory,
    model: Stored,
    *,
    best: Stored | None,
    events: Mapping[str, bytes],
    spool: Spool | None,
) -> tuple[SealedResult, SignedStatement, str]:
    """The sealed result, the statement about it, and the ledger's receipt for that.

    Raises ApprovalRefused for a recipient who may not download any more, ExportRefused, SpoolFailed.
    """
    record, charter = signed.record, party.charter()
    finished = rfc3339(party.clock())
    document = history.document(status=Status.FINISHED.value, finished=finished, model_sha256=model.digest)
    recipients = {}
    for recipient in record.recipients:
        user = charter.user(*recipient.split("/"))
        if user is None or not user.may("download"):
            raise ApprovalRefused(record.job, (f"the recipient {recipient} may not download results any more",))
        recipients[recipient] = unb64(user.results_key, where=recipient)
    text = json.dumps(document, indent=2, ensure_ascii=False).encode()
    files: dict[str, Buffer | Stored] = {MODEL_FILE: model, JOB_FILE: text, **events}
    if best is not None:
        files[BEST_FILE] = best
    sealed = seal_result(files, recipients, record.job, random=os.urandom, spool=spool)
    gate = ExportGate(party, record, ("server", server))
    for recipient in recipients:
        gate.let_out("result", sealed.payload.size, ("user", recipient), sealed=True)
    identity = party.standing()
    statement = Statement(
        charter=record.charter,
        job=record.job,
        name=record.name,
        record_sha256=record_digest(signed.token),
        bundle=record.bundle,
        server=server,
        roster=record.roster,
        contributors=tuple(sorted(history.contributors)),
        rounds=record.rounds,
        first_model_sha256=record.model_sha256,
        model_sha256=model.digest,
        result_sha256=sealed.payload.digest,
        recipients=record.recipients,
        started=rfc3339(history.started),
        finished=finished,
    )
    told = sign_statement(statement, identity.sign_key, identity.ears)
    receipt = party.record("result", {"job": record.job, **told.model_dump(mode="json", exclude={"ears"})})
    return sealed, told, receipt
