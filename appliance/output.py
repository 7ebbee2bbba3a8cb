"""What the command prints: one JSON object or words on standard output, errors and progress on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from policies.errors import Refused, SealwrightError


def print_json(value: Mapping[str, Any]) -> None:
    """Print the one object of `--json` to standard output."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def report_error(error: SealwrightError, *, as_json: bool) -> int:
    """Tell what went wrong and return the exit status: 1 for a refusal, 2 for unusable input."""
    if as_json:
        body: dict[str, Any] = {"what": error.what, "where": error.where, "do": error.do}
        if isinstance(error, Refused):
            body["reasons"] = list(error.reasons)
        print_json({"error": body})
    else:
        sys.stderr.write(f"seal: {error.what} ({error.where}). {error.do}\n")
        if isinstance(error, Refused):
            for reason in error.reasons:
                if reason != error.what:
                    sys.stderr.write(f"  - {reason}\n")
    return 1 if isinstance(error, Refused) else 2
