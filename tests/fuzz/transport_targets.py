"""What a fuzzer feeds with bytes that strangers and peers send to a server: one function a parser.

A parser may refuse input by its own error; anything else that leaves it is a defect.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from fl.errors import MalformedMessage, MalformedTensors
from fl.tensors import parse
from fl.transport.client_hello import MAX_HELLO, needed
from fl.transport.frames import FROM_ATTENDING_SITE, TO_ATTENDING_SITE, unpack
from fl.transport.port import protocol_of
from fl.transport.records import LENGTH, length_of, read_end


def client_hello(raw: bytes) -> None:
    """The first bytes of a connection, before anybody has proved anything."""
    with contextlib.suppress(MalformedMessage):
        if needed(raw) > MAX_HELLO:
            raise AssertionError("more is waited for than a hello may have")
    with contextlib.suppress(MalformedMessage):
        found = protocol_of(raw)
        if found not in {None, "grpc", "https", "plain"}:
            raise AssertionError("a protocol that is none")


def frame(raw: bytes) -> None:
    """A frame of an attendance, in either direction, and a record's length and end."""
    for adapter in (FROM_ATTENDING_SITE, TO_ATTENDING_SITE):
        with contextlib.suppress(MalformedMessage):
            unpack(adapter, raw, where="fuzz")
    with contextlib.suppress(MalformedMessage):
        read_end(raw)
    if len(raw) >= LENGTH:
        with contextlib.suppress(MalformedMessage):
            length_of(raw[:LENGTH])


def tensors(raw: bytes) -> None:
    """A safetensors file."""
    with contextlib.suppress(MalformedTensors):
        file = parse(raw, max_size=1 << 20)
        if sum(spec.size for spec in file.schema.values()) > len(raw):
            raise AssertionError("tensors that have more bytes than their file")


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__.replace("_", "-"): function for function in (client_hello, frame, tensors)
}
"""Targets by name."""
