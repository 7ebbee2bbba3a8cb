"""The steps of a masked sum, in their order (`fl.aggregation.masking`)."""

from __future__ import annotations

from typing import Final, Literal, get_args

Step = Literal["keys", "shares", "vector", "survivors", "unmask"]
STEPS: Final[tuple[Step, ...]] = get_args(Step)
MAX_BODY: Final = 24_000
"""Characters of what a device says in one step."""
