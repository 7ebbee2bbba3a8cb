"""What lets a device in: a token or a certificate, whichever its request shows. What follows is the same."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from fl.edge.device_certificates import read_certificate
from fl.edge.tokens import Device, read_token

if TYPE_CHECKING:
    from policies.charter import Charter


def read_credential(text: str, charter: Charter, at: datetime) -> Device:
    """The device of a token (a JWS, which has dots) or a certificate (base64 of DER). Raises Refused."""
    return read_token(text, charter, at) if "." in text else read_certificate(text, charter, at)
