"""The changes that a consortium makes on a bad day, as `Changes` for a proposal: docs/how-to/ has a page for each."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from policies.charter.content import Charter
from policies.charter.layout import MEMBER_ROLE
from policies.charter.making import Changes
from policies.charter.signing import refusal
from policies.documents import Consortium, Document, Enrolment, complaints


def _with(consortium: Consortium, **fields: Any) -> Consortium:
    """The consortium with other fields, checked as a whole. Raises ProposalRefused if it does not fit together."""
    try:
        return Consortium.model_validate({**consortium.model_dump(), **fields})
    except ValidationError as error:
        reasons = [complaint.replace("Value error, ", "") for complaint in complaints(error)]
        raise refusal("the consortium would not fit together", reasons) from error


def replace_member_key(charter: Charter, member: str, public_key: str) -> Changes:
    """A member's key is lost or stolen: the others give it a new one (PEM). The old one decides nothing any more.

    The member's own role is issued again, so the member signs the proposal with its new key, the others by threshold
    with theirs. Raises ProposalRefused if there is no such member or the key cannot be used.
    """
    _must_be_member(charter, member)
    members = tuple(
        {**item.model_dump(), **({"public_key": public_key} if item.name == member else {})}
        for item in charter.consortium.members
    )
    return Changes(consortium=_with(charter.consortium, members=members))


def member_joins(
    charter: Charter, member: str, public_key: str, *, threshold: int | None = None, jurisdiction: str | None = None
) -> Changes:
    """A member joins; the threshold stays unless it is given."""
    if charter.consortium.member(member) is not None:
        raise refusal("this member belongs already", [member])
    new = {"name": member, "public_key": public_key, "jurisdiction": jurisdiction}
    members = (*(item.model_dump() for item in charter.consortium.members), new)
    number = charter.consortium.threshold if threshold is None else threshold
    return Changes(consortium=_with(charter.consortium, members=members, threshold=number))


def member_leaves(charter: Charter, member: str, *, threshold: int | None = None) -> Changes:
    """A member leaves: with it go its key, brokers, witnesses, places, users, and release policies.

    The threshold stays unless it is given. Raises ProposalRefused if too few members or no broker would be left.
    """
    _must_be_member(charter, member)
    old = charter.consortium
    number = old.threshold if threshold is None else threshold
    fields = {
        "members": tuple(item.model_dump() for item in old.members if item.name != member),
        "brokers": tuple(item.model_dump() for item in old.brokers if item.member != member),
        "witnesses": tuple(item.model_dump() for item in old.witnesses if item.member != member),
        "threshold": number,
    }
    gone = {path for path in charter.files if path.startswith(f"{MEMBER_ROLE[:-1]}s/{member}/")}
    gone |= {path for path, document in charter.documents.items() if _place_of(document, member)}
    return Changes(consortium=_with(old, **fields), remove=frozenset(gone))


def _place_of(document: Document, member: str) -> bool:
    return isinstance(document, Enrolment) and document.member == member


def _must_be_member(charter: Charter, member: str) -> None:
    if charter.consortium.member(member) is None:
        names = ", ".join(item.name for item in charter.consortium.members)
        raise refusal(f"{member} is not a member", [f"members are {names}"])


def replace_broker(
    charter: Charter,
    broker: str,
    *,
    signing_key: str | None = None,
    issuer_certificate: str | None = None,
    url: str | None = None,
) -> Changes:
    """A broker is replaced: new keys (PEM) and, if it moved, a new URL. What its old keys sign counts no more.

    A witness that runs in it keeps its own key, and gets the broker's new TLS certificate and place.
    """
    old = charter.broker(broker)
    if old is None:
        raise refusal(f"there is no broker {broker}", [", ".join(item.name for item in charter.consortium.brokers)])
    new = {"signing_key": signing_key, "issuer_certificate": issuer_certificate, "url": url}
    given = {field: value for field, value in new.items() if value is not None}
    brokers = tuple(
        {**item.model_dump(), **(given if item.name == broker else {})} for item in charter.consortium.brokers
    )
    witnesses = []
    for witness in charter.consortium.witnesses:
        fields = witness.model_dump()
        if witness.issuer_certificate == old.issuer_certificate:
            fields["issuer_certificate"] = issuer_certificate or old.issuer_certificate
            fields["url"] = witness.url.replace(old.url.rstrip("/"), (url or old.url).rstrip("/"), 1)
        witnesses.append(fields)
    return Changes(consortium=_with(charter.consortium, brokers=brokers, witnesses=tuple(witnesses)))


def withdraw_image(charter: Charter, image: str) -> Changes:
    """An image must run no more: its reference values go, and with them every place that is enrolled for it."""
    if charter.image(image) is None:
        names = ", ".join(item.name for item in charter.images()) or "none"
        raise refusal(f"there is no image {image}", [f"images are {names}"])
    places = {
        path
        for path, document in charter.documents.items()
        if isinstance(document, Enrolment) and document.image == image
    }
    return Changes(remove=frozenset({f"images/{image}.json", *places}))


def require_profile(appraisal_toml: bytes) -> Changes:
    """A firmware version must be refused from now on (TCB recovery): another verifier profile for everybody."""
    return Changes(put={"policies/appraisal.toml": appraisal_toml})
