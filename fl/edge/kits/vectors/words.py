"""Vectors of the state table, of canonical JSON and of the messages' words."""

from __future__ import annotations

import struct
from typing import Any

from attestation.canonical import canonical_bytes, read_canonical
from fl.edge.messages import (
    ANSWERS,
    MAX_WORDS,
    JobRequest,
    Request,
    ResultRequest,
    SelectionRequest,
    TaskRequest,
    read_words,
)
from fl.edge.protocol import GAVE_UP, MESSAGES, SENDS, STATES, STATUSES, TABLE, TRAINED, Message, next_state
from fl.errors import MalformedMessage
from policies.errors import Unusable

TOKEN = "e30.e30.c2lnbmF0dXJl"  # noqa: S105 - a token is opaque to a device
BLOB = {"id": "1a" * 32, "key": "2b" * 32, "sha256": "3c" * 32, "size": 1000}
TASK: dict[str, Any] = {
    "version": 7,
    "name": "heart-rate",
    "digest": "4d" * 32,
    "format": "executorch",
    "config": {"batch_size": 4, "lr": 0.1},
    "graph": BLOB,
    "model": {**BLOB, "size": 1},
    "cookie": "5e" * 24,
    "ticket": "6f" * 24,
}
PLAIN = {"status": "OK", "message": "", "retry_seconds": 0}

_NUMBERS = (
    *(0.0, 1.0, -1.0, 0.1, 0.5, 1e-6, 1e-7, 123456.789, 1e20 / 3e5, 2.0**-44, 2.0**53 - 1, 1e21, 1.5e300, 5e-324),
    *(1.7976931348623157e308, 2.2250738585072014e-308, 0.30000000000000004, 1 / 3, 4.35, 9.5e-7, 1e23, 2.0**-1074 * 3),
)
_TEXTS = (
    "{}",
    '{"a":1,"b":[true,false,null,"x"],"c":{"d":-3}}',
    '{"€":"\\u0001\\t\\"\\\\/","\U0001f600":"é"}',
    '{"\U0001f600":1,"\ufb33":2}',
    '{"\ufb33":2,"\U0001f600":1}',
    '{"b":1,"a":2}',
    '{"a":1,"a":1}',
    '{"a": 1}',
    '{"a":1.0}',
    '{"a":01}',
    '{"a":-0}',
    '{"a":1e2}',
    '{"a":1e-7}',
    '{"a":0.0000001}',
    '{"a":9007199254740991}',
    '{"a":9007199254740993}',
    '{"a":NaN}',
    '{"a":Infinity}',
    '{"a":+1}',
    '{"a":.5}',
    '{"a":"\\u0041"}',
    '{"a":"\\ud800"}',
    '{"a":"\\/"}',
    '{"a":"\\u000A"}',
    '{"a":"\n"}',
    '{"a":"\x7f"}',
    '{"a":tru}',
    '{"a":[1,]}',
    '{"a":1,}',
    '{"a"}',
    "{",
    "",
    "[]",
    "1",
    "{}x",
    "{} ",
    '"a"',
    "{'a':1}",
)


def protocol() -> dict[str, Any]:
    """The table, and where each status of each message leads."""
    return {
        "states": list(STATES),
        "sends": dict(SENDS),
        "trained": TRAINED,
        "gave_up": GAVE_UP,
        "table": [
            {"state": r.state, "message": r.message, "status": r.status, "then": r.then, "waits": r.waits}
            for r in TABLE
        ],
        "next": {message: {status: next_state(message, status).then for status in STATUSES} for message in MESSAGES},
    }


def json_forms() -> dict[str, Any]:
    """Texts that are, or are not, one JSON object in its canonical form; numbers by their IEEE 754 bits."""
    texts = [*_TEXTS, '{"a":' + "[" * 40 + "]" * 40 + "}"]
    raws = [*(text.encode() for text in texts), b'{"a":"\xff"}', b'{"a":"\xed\xa0\x80"}', b"\xef\xbb\xbf{}"]
    return {
        "texts": [{"raw": raw.hex(), "good": _is_canonical(raw)} for raw in raws],
        "numbers": [
            {"bits": struct.pack(">d", number).hex(), "text": canonical_bytes(number).decode()}
            for number in (*_NUMBERS, *(-one for one in _NUMBERS if one))
        ],
    }


def _is_canonical(raw: bytes) -> bool:
    try:
        read_canonical(raw, where="vector", limit=MAX_WORDS)
    except Unusable:
        return False
    return True


def messages() -> dict[str, Any]:
    """Requests as a device writes them, and answers of which it takes some."""
    common = {"token": TOKEN, "request": "0123456789abcdef" * 2, "answer_key": "fedcba9876543210" * 4}
    requests: dict[Message, Request] = {
        "job": JobRequest(**common, jobs=("heart-*", "sleep"), capabilities={"os": "linux", "cpu": "8"}),
        "task": TaskRequest(**common, job="job-1", wait_seconds=2.5),
        "selection": SelectionRequest(**common, job="job-1", version=7),
        "result": ResultRequest(
            **common,
            job="job-1",
            version=7,
            task="4d" * 32,
            weight=8.0,
            encoding="bf16",
            compressed=True,
            cookie="5e" * 24,
        ),
    }
    return {
        "common": common,
        "requests": {message: request.to_bytes().decode() for message, request in requests.items()},
        "answers": [
            {"message": message, "text": raw.decode(), "good": _is_answer(message, raw)}
            for message, raw in ((message, canonical_bytes(words)) for message, words in _answers())
        ],
    }


def _answers() -> list[tuple[Message, dict[str, Any]]]:
    job = {**PLAIN, "job": "job-1", "name": "heart-rate", "method": "fedbuff", "config": {"epoch": 1}}
    task = {**PLAIN, "task": TASK}
    found: list[tuple[Message, dict[str, Any]]] = [("job", job), ("task", task)]
    found += [("job", {**PLAIN, **change}) for change in ({}, {"status": "NO_JOB", "retry_seconds": 60.5})]
    versions: tuple[Any, ...] = ([], [1, 2], [2**31], ["1"], [1.5], None)
    found += [("selection", {**PLAIN, "versions": one}) for one in versions]
    plain: dict[str, tuple[Any, ...]] = {
        "status": ("", "ok", 1, None, "GONE"),
        "message": ("x" * 500, "x" * 501, 3, None),
        "retry_seconds": (86400, 86401, -1, "1", True),
        "more": (1,),
    }
    found += [("result", {**PLAIN, name: value}) for name, values in plain.items() for value in values]
    of_job: dict[str, tuple[Any, ...]] = {
        "job": ("", "a/b", "-a", None, 1, "x" * 129),
        "name": ("", "x" * 129, None),
        "config": ([], "x", None, {"a": None}),
    }
    found += [("job", {**job, name: value}) for name, values in of_job.items() for value in values]
    of_task: dict[str, tuple[Any, ...]] = {
        "version": (0, -1, 2**31, 1.5, "1", True),
        "digest": ("4D" * 32, "4d" * 31, 1),
        "format": ("torch", ""),
        "cookie": ("", "a" * 257, "g"),
        "graph": (*({**BLOB, "size": size} for size in (0, 1 << 40, 1.5, "1")), {**BLOB, "more": 1}, {"id": "1a" * 32}),
        "more": (1,),
    }
    found += [
        ("task", {**PLAIN, "task": {**TASK, name: value}}) for name, values in of_task.items() for value in values
    ]
    found += [("task", {**PLAIN, "task": None}), ("task", {"message": "", "retry_seconds": 0}), ("task", {})]
    return found


def _is_answer(message: Message, raw: bytes) -> bool:
    try:
        read_words(ANSWERS[message], raw, where="vector")
    except MalformedMessage:
        return False
    return True
