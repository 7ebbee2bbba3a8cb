"""What is generated from the device protocol's table, messages and routes: its reference page and OpenAPI document.

    python -m fl.edge.reference docs/reference

A test holds the files against what this makes, and the document against a running gateway.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from attestation.introduction import Introduction
from fl.edge.messages import ANSWERS, REQUESTS, Blob, ProofRequest, Task
from fl.edge.protocol import GAVE_UP, MESSAGES, STATES, TABLE, TRAINED
from fl.edge.routes import ANY, JSON, PREFIX, ROUTES, Route
from fl.edge.sealing import SEAL_OVERHEAD

PAGE: Final = "device-protocol.md"
DOCUMENT: Final = "device-protocol.openapi.json"

_INTRODUCTION: Final = """# Device protocol
Between a device and a gateway: HTTP/1.1 over TLS, under `{prefix}`. This page is made from `fl/edge/protocol.py`,
`messages.py` and `routes.py`
by `python -m fl.edge.reference docs/reference`; the same as [OpenAPI]({document}). Why it is so: [ADR
36](../adr/0036-devices-speak-in-sealed-messages.md).

A device begins with the charter's first root and nothing else.

1. `GET charter`: the charter verifies itself from that root. In production, one for the virtual platform is refused.
2. `POST proof` with 32 hex digits of its own: the gateway's EARs (of as many brokers as the charter asks for, over
   its signing key; affirming,
   not ended) and its word, signed by that key over the device's nonce, with the **group key**. Only then does a
   device send anything.
3. The messages below, each sealed to the group key. When the EARs have ended, or the answer is HTTP 410, it
   begins at 1 again.

Whoever ends TLS on the way sees lengths and times, and may speak HTTP/2 to devices. Any gateway of the charter can
answer any device at any time; of an upload that broke off only the process that has its pieces knows, and elsewhere it
begins anew.
"""

_SEALS: Final = """## Seals
The body of a request is `key id (32) | HPKE(content)`: base mode, KEM MLKEM768_X25519, HKDF-SHA256, AES-256-GCM;
`key id` is the SHA-256 of the
raw public key, and `info` is `"sealwright-edge-request-v1" 00 | charter id (32) | message | 00 | key id`. The
content is
`length (4, big-endian) | words | tensors | signature (64)`. The signature is ECDSA (P-256, SHA-256, r and s of 32
bytes each) by the
device's key over `"sealwright-edge-signed-v1" 00 | charter id | message | 00 | length | words | tensors`. All this
adds {overhead} bytes, the
length and the signature.

The body of an answer is `nonce (12) | AES-256-GCM(answer_key, nonce, words)`; the associated data is
`"sealwright-edge-answer-v1" 00 | request (16)`. A blob is `AES-256-GCM(key, zero nonce, content)` without
associated data: each content has
a key of its own.

Words are JSON in canonical form (RFC 8785) with every field and no other. Tensors are one safetensors file of
differences from the model,
for exactly its tensors of floats, as F32 (`f32`), BF16 (`bf16`), or I8 with an F32 scalar `NAME#scale` each
(`int8`); `compressed`: zlib.
The vectors in `tests/vectors/edge` have one of each.

## Tokens
A device's token is a JWS (Ed25519, `typ` `sealwright-device+jwt`, `kid` the issuer's name in the charter's
`enrolments/device-issuer/NAME.json`) over `charter`, `device` (32 random hex digits), `key` (its P-256 key, SPKI in
DER, base64), `jobs`, `iat`, `exp`.
In its place a device may show a certificate that says the same, as the base64 of its DER: [ADR
44](../adr/0044-a-device-has-a-token-or-a-certificate.md). Ids that the issuer's document names as `revoked` are let
in by neither.
One device counts once in a version of the model: its contribution id is the SHA-256 of
`"sealwright-contribution-v1" 00` and the canonical JSON of `device` (`ISSUER/DEVICE`), `job` and `version`.

## Tasks
A device runs a task only if the charter has `code/device-DIGEST.json` for its job. DIGEST is the SHA-256 of
`"sealwright-device-task-v1" 00` and the
canonical JSON of `config`, `format`, `graph` (its SHA-256) and `job` (its name).
"""

_MASKS: Final = """## Masked sums
A task whose configuration has `secure_aggregation.` and `cohort`, `threshold`, `limit`, `seconds`, `clip_norm`,
`max_weight` is reported by `mask` alone, in five steps. `body` is JSON in any layout; keys and shares are in hex.

| step | a device says | it hears, when all have or `seconds` are over |
|---|---|---|
| `keys` | `token`, two X25519 keys `cipher` and `mask`, `signature` | by device, what each has said in this step |
| `shares` | by neighbour, an encrypted share of its mask key and its seed | by neighbour, the share for this device |
| `vector` | as tensors `values` and `weight` (U64), both masked | the survivors, as names of an object |
| `survivors` | its signature over the round and the survivors | by survivor, such a signature |
| `unmask` | by device, its share of a survivor's seed, or of a lost one's mask key | NO_TASK `counted` |

Devices are named `ISSUER/DEVICE`, and each verifies the tokens of all others by the charter. Signatures are ECDSA
(P-256, SHA-256) by the token's key over `"sealwright-device-mask-v1" 00` and canonical JSON: `cipher`, `context`,
`mask`, `step`; and `round`, `step`, `survivors`. `context` is the SHA-256 of `"sealwright-device-cohort-v1" 00` and the
canonical JSON of `charter`, `job` (its id), `task`, `version`. What follows from the keys is the round of [secure
aggregation](../explanation/secure-aggregation.md), with each device as its own member. A number x of weight w is
round(x w (2**52 / (limit 65536))), modulo 2**64. Only devices that say they have the capability `masks` are given such
a job; of the kits, the Python one.
"""


def page() -> str:
    """The reference page."""
    lines = [_INTRODUCTION.format(prefix=PREFIX, document=DOCUMENT), "## States and statuses", ""]
    lines += ["| state | a device |", "|---|---|", *(f"| `{state}` | {says} |" for state, says in STATES.items()), ""]
    lines += ["| in state | it sends | status | then | waits | when |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{one.state}` | `{one.message}` | {one.status} | `{one.then}` | {'yes' if one.waits else ''} | {one.when} |"
        for one in TABLE
    ]
    lines += [
        "",
        f"A task that has a result leads from `training` to `{TRAINED}`, one that has none to `{GAVE_UP}`. A status",
        "that is not in the table for its message counts as ERROR. *Waits*: for `retry_seconds` of the answer; after",
        "ERROR, and when no gateway answers, longer each time.",
        "",
        "## Messages",
        "Each request has the fields of `Request`, each answer those of `Answer`.",
        "",
    ]
    kinds: list[tuple[str, type[BaseModel]]] = []
    for message in MESSAGES:
        kinds += [(f"`{message}`", REQUESTS[message]), (f"answer to `{message}`", ANSWERS[message])]
    kinds += [("in a task's answer", Task), ("something to fetch", Blob)]
    for title, kind in kinds:
        lines += [f"### {kind.__name__}: {title}", *_plain(kind.__doc__), "", *_fields(kind), ""]
    lines += [_SEALS.format(overhead=SEAL_OVERHEAD), _MASKS]
    lines += ["## Routes", "| | answers |", "|---|---|", *map(_row, ROUTES), ""]
    lines += ["Any of them may answer:", "", *(f"- {status}: {why}" for status, why in ANY.items())]
    return "\n".join(lines) + "\n"


def _plain(text: str | None) -> Iterator[str]:
    for line in (text or "").strip().splitlines():
        yield line.strip()


def _fields(kind: type[BaseModel]) -> Iterator[str]:
    schema = kind.model_json_schema()
    yield "| field | |"
    yield "|---|---|"
    for name, told in schema["properties"].items():
        yield f"| `{name}` | {_kind(told, schema.get('$defs', {}))} |"


def _kind(told: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    if "$ref" in told:
        return f"`{told['$ref'].rpartition('/')[2]}`"
    if "anyOf" in told:
        return " or ".join(_kind(one, named) for one in told["anyOf"])
    if "enum" in told or "const" in told:
        return ", ".join(f"`{one}`" for one in told.get("enum", [told.get("const")]))
    words = [str(told.get("type", "any"))]
    if "items" in told:
        words.append(f"of {_kind(told['items'], named)}")
    bounds = {
        "pattern": "`{}`",
        "minLength": "at least {} characters",
        "maxLength": "at most {} characters",
        "minItems": "at least {}",
        "maxItems": "at most {}",
        "maxProperties": "at most {}",
        "minimum": "from {}",
        "exclusiveMinimum": "above {}",
        "maximum": "to {}",
        "exclusiveMaximum": "below {}",
    }
    words += [form.format(told[name]).replace("|", "\\|") for name, form in bounds.items() if name in told]
    return ", ".join(words).replace(", of ", " of ")


def _row(route: Route) -> str:
    answers = "; ".join(f"{status}: {why}" for status, (_, why) in route.responses.items())
    return f"| `{route.method} {PREFIX}{route.path}` {route.summary} | {answers} |"


def document() -> dict[str, Any]:
    """The OpenAPI document (3.1)."""
    kinds: list[type[BaseModel]] = [ProofRequest, Introduction, *REQUESTS.values(), *ANSWERS.values()]
    _, found = models_json_schema(
        [(kind, "serialization") for kind in kinds], ref_template="#/components/schemas/{model}"
    )
    schemas = {
        **found["$defs"],
        "CharterFiles": _object({"files": {"type": "object", "additionalProperties": {"type": "string"}}}),
        "Offset": _object(
            {"offset": {"type": "integer", "minimum": 0}}, error={"$ref": "#/components/schemas/Failure"}
        ),
        "Failure": _object({"what": {"type": "string"}}),
        "Error": _object({"error": {"$ref": "#/components/schemas/Failure"}}),
    }
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        paths.setdefault(PREFIX + route.path, {})[route.method.lower()] = _operation(route)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Sealwright device protocol",
            "version": "1",
            "description": "application/octet-stream: sealed (device-protocol.md); what it says is in the schemas.",
        },
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _object(fields: Mapping[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**fields, **optional},
        "required": sorted(fields),
        "additionalProperties": False,
    }


_BODIES: Final = {"charter": "CharterFiles", "proof": "Introduction", "offset": "Offset", "upload": "Offset"}


def _operation(route: Route) -> dict[str, Any]:
    def parameter(name: str, where: str, says: str, *, required: bool) -> dict[str, Any]:
        return {"name": name, "in": where, "required": required, "description": says, "schema": {"type": "string"}}

    parameters = [parameter(name, "header", says, required=name != "Range") for name, says in route.headers.items()]
    parameters += [parameter(name, "query", says, required=False) for name, says in route.query.items()]
    if route.path.endswith("{id}"):
        parameters.append(parameter("id", "path", "64 hex digits.", required=True))
    made: dict[str, Any] = {"operationId": _name(route), "summary": route.summary, "parameters": parameters}
    if route.request:
        schema = {"$ref": "#/components/schemas/ProofRequest"} if route.request == JSON else _BINARY
        made["requestBody"] = {"required": True, "content": {route.request: {"schema": schema}}}
    made["responses"] = {}
    for status, (media, why) in route.responses.items():
        named = _BODIES.get(route.name, "Error") if status < 300 or status == 409 else "Error"
        shown = _BINARY if media != JSON else {"$ref": f"#/components/schemas/{named}"}
        made["responses"][str(status)] = {
            "description": why,
            **({"content": {media: {"schema": shown}}} if media else {}),
        }
    for status, why in ANY.items():
        made["responses"][str(status)] = {
            "description": why,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}},
        }
    return made


_BINARY: Final = {"type": "string", "contentMediaType": "application/octet-stream"}


def _name(route: Route) -> str:
    return route.path.strip("/") if route.name == "message" else route.name


def main(folder: Path) -> None:
    """Write both into `folder`."""
    (folder / PAGE).write_text(page())
    (folder / DOCUMENT).write_text(json.dumps(document(), indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
