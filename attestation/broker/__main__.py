"""`python -m attestation.broker CONFIG`: run a broker, without the command's other parts."""

from __future__ import annotations

import sys
from pathlib import Path

from attestation.broker.server import run_broker
from policies.errors import Refused, SealwrightError


def main() -> int:
    """Run the broker named on the command line; return the exit status."""
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m attestation.broker CONFIG\n")
        return 2
    try:
        run_broker(Path(sys.argv[1]).absolute())
    except SealwrightError as error:
        sys.stderr.write(f"broker: {error}\n")
        if isinstance(error, Refused):
            sys.stderr.writelines(f"  - {reason}\n" for reason in error.reasons)
        return 1 if isinstance(error, Refused) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
