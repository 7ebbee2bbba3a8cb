"""The routes of a gateway's HTTP service, as data: what serves them, and what the OpenAPI document is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from fl.edge.protocol import MESSAGES

PREFIX: Final = "/edge/v1"
SEALED: Final = "application/octet-stream"
JSON: Final = "application/json"

Name = Literal["charter", "proof", "blob", "message", "upload", "offset"]


@dataclass(frozen=True, slots=True)
class Route:
    """One route: `name` is what serves it. A `path` may end in `{id}`, 64 hex digits. `responses`: media type ("": no
    body) and meaning by status; every route may answer 400, 404, 413 and 503, too. `headers` and `query`: those that it
    reads, and what they hold."""

    name: Name
    method: Literal["GET", "POST", "PUT"]
    path: str
    summary: str
    request: str
    responses: Mapping[int, tuple[str, str]]
    headers: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, str] = field(default_factory=dict)


_GONE: Final = {410: (JSON, "It is sealed to a group key that is gone: ask for the proof again.")}
_UPLOAD: Final = {"Upload-Ticket": "The ticket of the task's answer."}

ROUTES: Final[tuple[Route, ...]] = (
    Route(
        "charter",
        "GET",
        "/charter",
        "The charter's files, which verify themselves from its root; 204 if `above` is its version.",
        "",
        {200: (JSON, "`files`: base64 by name."), 204: ("", "There is no newer one.")},
        query={"above": "The version that the device has."},
    ),
    Route(
        "proof",
        "POST",
        "/proof",
        "Who the gateway is: its EARs, and its signed word over the device's nonce with the group key.",
        JSON,
        {200: (JSON, "An introduction (attestation.introduction).")},
    ),
    *(
        Route(
            "message",
            "POST",
            f"/{message}",
            f"The message `{message}` of the device protocol, sealed.",
            SEALED,
            {200: (SEALED, "The sealed answer."), **_GONE},
        )
        for message in MESSAGES
    ),
    Route(
        "blob",
        "GET",
        "/blobs/{id}",
        "An encrypted model or graph that a task names; ranges are served, and caches may keep it.",
        "",
        {200: (SEALED, "The whole."), 206: (SEALED, "The range."), 416: (JSON, "There is no such range.")},
        headers={"Range": "`bytes=FIRST-` or `bytes=FIRST-LAST`."},
    ),
    Route(
        "offset",
        "GET",
        "/uploads/{id}",
        "Where an upload goes on. `id` is the SHA-256 of the whole, the sealed body of a `result`.",
        "",
        {200: (JSON, "`offset`: how many bytes are here.")},
        headers=_UPLOAD,
    ),
    Route(
        "upload",
        "PUT",
        "/uploads/{id}",
        "A piece of an upload; the last one is answered as `result` would be.",
        SEALED,
        {
            200: (SEALED, "The sealed answer: that was the last piece."),
            202: (JSON, "`offset`: where the next piece begins."),
            409: (JSON, "`offset`: the piece does not begin where the upload goes on."),
            **_GONE,
        },
        headers={**_UPLOAD, "Upload-Offset": "Where the piece begins.", "Upload-Length": "Bytes of the whole."},
    ),
)
ANY: Final[Mapping[int, str]] = {
    400: "It is malformed.",
    404: "There is none, or the ticket is none.",
    413: "It is larger than it may be.",
    503: "The gateway has no room or no lease: come again after Retry-After seconds.",
}
