"""The charter: who may decide what, with which threshold, as TUF metadata; founding, changing, verifying it."""

from policies.charter.content import Charter
from policies.charter.making import Changes, Lifetimes, amend, found, propose, propose_founding
from policies.charter.proposal import Proposal, files_of, parse_proposal, path_of, write_proposal
from policies.charter.signing import SigningKey, current_charter, publish, review, sign
from policies.charter.store import read_store, write_store
from policies.charter.timestamps import sign_timestamp
from policies.charter.trust import load_charter

__all__ = [
    "Changes",
    "Charter",
    "Lifetimes",
    "Proposal",
    "SigningKey",
    "amend",
    "current_charter",
    "files_of",
    "found",
    "load_charter",
    "parse_proposal",
    "path_of",
    "propose",
    "propose_founding",
    "publish",
    "read_store",
    "review",
    "sign",
    "sign_timestamp",
    "write_proposal",
    "write_store",
]
