"""Frames on the body of an HTTP request or answer: each after its length (u32, big-endian).

Length 0 is no frame but a sign of life. A length with its highest bit set is the end of an answer: a JSON object with
the call's `status`, by gRPC's name, and `details`. A body that ends without it was cut.
"""

from __future__ import annotations

import json
import struct
from typing import Final

from fl.errors import MalformedMessage
from fl.transport.frames import MAX_FRAME

LENGTH: Final = 4
SIGN_OF_LIFE: Final = b"\0\0\0\0"
MAX_END: Final = 16 << 10
_END: Final = 1 << 31


def length_of(raw: bytes) -> tuple[int, bool]:
    """How many bytes follow, and whether they are an end. Raises MalformedMessage beyond the bounds."""
    (length,) = struct.unpack(">I", raw)
    end = bool(length & _END)
    size = length & (_END - 1)
    if size > (MAX_END if end else MAX_FRAME):
        raise MalformedMessage(f"a record says {size} bytes", where="record")
    return size, end


def prefix_of(frame: bytes) -> bytes:
    """What goes before a frame."""
    return struct.pack(">I", len(frame))


def end_record(status: str, details: str) -> bytes:
    """The last record of an answer."""
    text = json.dumps({"status": status, "details": details}).encode()
    return struct.pack(">I", len(text) | _END) + text


def read_end(raw: bytes) -> tuple[str, str]:
    """Status and details of an end. Raises MalformedMessage."""
    try:
        document = json.loads(raw)
        status, details = document["status"], document["details"]
        if set(document) != {"status", "details"} or not isinstance(status, str) or not isinstance(details, str):
            raise ValueError("other fields")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise MalformedMessage("the end of an answer is none", where="record") from error
    return status, details
