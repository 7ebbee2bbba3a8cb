"""Brokers keep one charter together: each shows the others its timestamp, and gets what it lacks.

What a round brings is verified like anything that an operator puts into the charter's folder: a timestamp by the
brokers' threshold, a newer charter by its members' thresholds, from the root that this broker was given. So no broker
has to be believed, and a charter that was published at one broker reaches all.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import datetime
from typing import Final

from attestation.broker.charters import CharterFolder, Reply
from attestation.canonical import b64, canonical_bytes, unb64
from attestation.connection import BrokerClient
from attestation.errors import AnswerRefused
from attestation.fan_out import ask_all
from policies.errors import Refused, SealwrightError

PATH: Final = "/v1/timestamp"
ROUND_SECONDS: Final = 10.0
"""How long one round of questions takes at most."""
CALL_SECONDS: Final = 5.0
"""How long one broker may take for its connection and for each pause."""


def stamping_round(name: str, charters: CharterFolder, at: datetime) -> dict[str, str]:
    """Show the charter's other brokers what the broker `name` has, and take what they have; blocks.

    Returns what stands in the way, by broker. Raises Refused or Unusable if what lies in the folder does not hold.
    """
    offer = charters.offer(at)
    with ExitStack() as stack:
        peers: dict[str, BrokerClient] = {}
        for entry in offer.consortium.brokers:
            if entry.name != name:
                peers[entry.name] = BrokerClient(entry, offer.consortium.trust_domain, timeout=CALL_SECONDS)
                stack.callback(peers[entry.name].close)
        replies, problems = _show(peers, offer.timestamp)
        for broker, reply in replies.items():
            if reply.version > offer.version:
                try:
                    charters.take(peers[broker].charter_store(newest=True), at)
                except SealwrightError as error:
                    problems[broker] = _words(error)
            elif reply.version < offer.version:
                problems[broker] = f"it has version {reply.version} of the charter"
        complete = charters.join([reply.timestamp for reply in replies.values() if reply.timestamp is not None], at)
        if complete is not None:
            _, failed = _show({broker: peers[broker] for broker in replies}, complete)
            problems |= failed
    return problems


def _show(peers: dict[str, BrokerClient], timestamp: bytes) -> tuple[dict[str, Reply], dict[str, str]]:
    body = canonical_bytes({"timestamp": b64(timestamp)})
    questions = {broker: lambda client=client: _ask(client, body) for broker, client in peers.items()}
    replies, failures = ask_all(questions, seconds=ROUND_SECONDS)
    return replies, {broker: _words(error) for broker, error in failures.items()}


def _ask(client: BrokerClient, body: bytes) -> Reply:
    result = client.answer("POST", PATH, body, nonce="").result
    version, timestamp = result.get("version"), result.get("timestamp")
    if type(version) is not int or not (timestamp is None or isinstance(timestamp, str)):
        raise AnswerRefused((f"broker {client.name} answers an offered timestamp with something else",))
    return Reply(version, None if timestamp is None else unb64(timestamp, where=f"timestamp from {client.name}"))


def _words(error: SealwrightError) -> str:
    return "; ".join(error.reasons[:3]) if isinstance(error, Refused) else error.what
