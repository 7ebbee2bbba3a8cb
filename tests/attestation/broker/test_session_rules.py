"""A session's rules as a state machine: a nonce works once, a counter only grows, an end is an end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from attestation.broker.sessions import Session, attested, attested_session, open_session, take_nonce, use
from attestation.errors import SessionRefused

AT = datetime(2026, 1, 31, 12, tzinfo=UTC)


def fresh(protocol: str = "v1") -> Session:
    return open_session(
        "v1" if protocol == "v1" else "kbs",
        identifier="a" * 32,
        nonce=bytes(32),
        guest_nonce="g",
        at=AT,
        seconds=60,
        charter_version=1,
    )


def affirmed(session: Session) -> Session:
    return attested(session, ear="e", expires=AT + timedelta(minutes=5), keys={}, tee_pubkey=None, at=AT)


def test_the_other_protocol_and_no_session_are_refused() -> None:
    for session in (None, fresh("kbs")):
        with pytest.raises(SessionRefused):
            take_nonce(session, "v1", AT)


def test_the_end_is_the_end() -> None:
    session = affirmed(take_nonce(fresh(), "v1", AT))
    use(session, "v1", AT + timedelta(minutes=4, seconds=59), counter=1)
    with pytest.raises(SessionRefused, match="ended"):
        use(session, "v1", AT + timedelta(minutes=5), counter=1)
    with pytest.raises(SessionRefused, match="ended"):
        take_nonce(fresh(), "v1", AT + timedelta(seconds=60))


class SessionMachine(RuleBasedStateMachine):
    """Any order of calls: at most one nonce, one attestation, growing counters."""

    def __init__(self) -> None:
        super().__init__()
        self.session = fresh()
        self.taken = self.affirmed = False
        self.last = 0

    @rule()
    def take(self) -> None:
        if self.taken:
            with pytest.raises(SessionRefused):
                take_nonce(self.session, "v1", AT)
        else:
            self.session = take_nonce(self.session, "v1", AT)
            self.taken = True

    @rule()
    def affirm(self) -> None:
        if self.taken and not self.affirmed:
            self.session = affirmed(self.session)
            self.affirmed = True
        else:
            with pytest.raises(SessionRefused):
                affirmed(self.session)

    @rule(counter=st.integers(1, 20))
    def call(self, counter: int) -> None:
        if self.affirmed and counter > self.last:
            self.session = use(self.session, "v1", AT, counter=counter)
            self.last = counter
        else:
            with pytest.raises(SessionRefused):
                use(self.session, "v1", AT, counter=counter)

    @rule()
    def look(self) -> None:
        if self.affirmed:
            assert attested_session(self.session, "v1", AT) == self.session
        else:
            with pytest.raises(SessionRefused):
                attested_session(self.session, "v1", AT)


TestSessionMachine = SessionMachine.TestCase
TestSessionMachine.settings = settings(max_examples=60, stateful_step_count=12)
