"""What can go wrong in a federated job, each as one sentence that names the thing, the place and the remedy."""

from __future__ import annotations

from policies.errors import Refused, Unusable


class MalformedTensors(Unusable):
    """Bytes that are not one well-formed safetensors file within its limits."""

    def __init__(self, what: str, *, where: str = "safetensors") -> None:
        super().__init__(what, where=where, do="Send tensors as written by fl.tensors or the safetensors library.")


class MalformedMessage(Unusable):
    """A frame, chunk or message that breaks its format or its bound."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(what, where=where, do="The peer is broken or hostile; nothing of the message was used.")


class RecipeUnusable(Unusable):
    """A recipe whose arguments do not make a job."""

    def __init__(
        self, what: str, *, where: str, do: str = "Correct the recipe; docs/reference/recipes.md has each argument."
    ) -> None:
        super().__init__(what, where=where, do=do)


class UpdateRefused(Refused):
    """A site's update that was not folded, with every reason."""

    def __init__(self, site: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"the update of {site} is refused: {reasons[0]}",
            where=site,
            do="The job goes on without this site while enough others are left.",
            reasons=reasons,
        )


class OutputRefused(Refused):
    """An answer of a script that may not leave its site.

    `what` is one of our own sentences, which may leave; `reasons` can repeat what the script said, and stay here.
    """

    def __init__(self, site: str, why: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"the update of {site} may not leave it: {why}",
            where=site,
            do="Run the recipe in SimEnv, which tells the reasons in full.",
            reasons=reasons,
        )


class AggregationFailed(Refused):
    """A round whose updates are too few for the rule that aggregates them."""

    def __init__(self, what: str) -> None:
        super().__init__(what, where="aggregation", do="Have more sites take part, or guard against fewer bad ones.")


class MaskingRefused(Refused):
    """A step of secure aggregation that is not taken: it is malformed, out of turn, or would tell too much."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"secure aggregation stops: {what}",
            where="secure aggregation",
            do="See that enough members' sites take part; docs/explanation/secure-aggregation.md.",
        )


class BudgetSpent(Refused):
    """A job that stops at a site because what it would let out is not debited, with every reason."""

    def __init__(self, job: str, site: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"job {job} stops at {site}: {reasons[0]}",
            where=site,
            do="Have the budget raised in the charter (docs/how-to/set-a-privacy-budget.md), or let the job end.",
            reasons=reasons,
        )


class ExportRefused(Refused):
    """Something that the consortium's rules do not let out, with every reason."""

    def __init__(self, kind: str, who: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"the {kind} may not leave {who}: {reasons[0]}",
            where=who,
            do="Have the charter's export rules changed, or run the job where they allow it.",
            reasons=reasons,
        )


class ApprovalRefused(Refused):
    """A job that may not run here: its record, its rights or its bundle failed a check."""

    def __init__(self, job: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"job {job} may not run: {reasons[0]}",
            where="job record",
            do="Have the bundle approved for these sites, or submit within your rights.",
            reasons=reasons,
        )


class CommandRefused(Refused):
    """A user's command that is not done here, with every reason."""

    def __init__(self, command: str, user: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"{command} by {user} is refused: {reasons[0]}",
            where="command",
            do="Stay within your rights, or have the charter give you more.",
            reasons=reasons,
        )


class JobFailed(Refused):
    """A job that ended without a result, with the reason of each site that was lost."""

    def __init__(self, job: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"job {job} failed: {reasons[0]}",
            where="job",
            do="Read the site's log; run it in SimEnv first.",
            reasons=reasons,
        )


class JobAborted(Refused):
    """A job that someone stopped."""

    def __init__(self, job: str, by: str) -> None:
        super().__init__(f"job {job} was stopped by {by}", where="job", do="Submit it again to run it again.")


class SimulationRefused(Refused):
    """A simulation that would come near released keys, a site's data or another machine."""

    def __init__(
        self,
        what: str,
        *,
        where: str,
        do: str = "Simulate with data of your own, in folders of this machine; ProdEnv has the sites'.",
    ) -> None:
        super().__init__(what, where=where, do=do)


class ScriptFailed(Refused):
    """A training script that ended, or was ended, before its job did.

    `told` is what of it may leave the site: without what the script said.
    """

    def __init__(self, site: str, why: str, *, told: str | None = None) -> None:
        super().__init__(f"the training script of {site} {why}", where=site, do="Read the site's log.")
        self.told = f"the training script of {site} {told or why}"


class SandboxUnusable(Unusable):
    """A host on which the sandbox cannot be made."""

    def __init__(self, what: str, *, do: str = "Run `seal doctor`.") -> None:
        super().__init__(what, where="sandbox", do=do)


class SandboxFailed(Refused):
    """A sandbox that could not be started for this job."""

    def __init__(self, what: str) -> None:
        super().__init__(what, where="sandbox", do="Run `seal doctor`.")


class PeerLost(Refused):
    """A connection that ended, or a wait that came to its bound."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(what, where=where, do="Check that the peer runs and is reachable.")


class CallFailed(Exception):
    """A call that ended before its time: a status by gRPC's name, and details (a refusal's are JSON).

    `fl.transport.channel.peer_error` says what it means.
    """

    def __init__(self, status: str, details: str) -> None:
        super().__init__(f"{status}: {details[:200]}")
        self.status = status
        self.details = details


class RoundOver(Refused):
    """A site that was away asks for the model of a round that went on without it."""

    def __init__(self, what: str) -> None:
        super().__init__(what, where="round", do="Take part in the next one.")


class LeaseLapsed(PeerLost):
    """A connection that ended, or did not come about, because a lease has ended: its guest may renew it and go on."""


class SealedDataRefused(Refused):
    """A sealed file that does not open."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(
            what, where=where, do="Use the key and the name with which it was sealed, and the file unchanged."
        )


class SpoolFailed(Refused):
    """The spool's disk is full, cannot be used, or gives back something else than was written."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(what, where=where, do="Look at the disk of the server's vault; what was spooled is lost.")


class StatementRefused(Refused):
    """A result whose statement does not hold: it may not be the job's."""

    def __init__(self, job: str, reasons: tuple[str, ...]) -> None:
        super().__init__(
            f"the result of {job} is refused: {reasons[0]}",
            where="statement",
            do="Do not use it; ask the server's operator and look into the ledger.",
            reasons=reasons,
        )


class KitUnusable(Unusable):
    """A user's kit that cannot be used."""

    def __init__(self, what: str, *, where: str) -> None:
        super().__init__(what, where=where, do="Ask your member's administrator for your kit's folder.")
