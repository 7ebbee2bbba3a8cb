"""What the image pipeline raises."""

from __future__ import annotations

from policies.errors import Refused, Unusable


class UnusableImage(Unusable):
    """An image folder, a recipe or a key from which nothing can be made."""


class ToolFailed(Unusable):
    """A tool of the pipeline that is missing or ended with an error; the message holds its command and last lines."""


class ImageRefused(Refused):
    """An image that is not what its manifest says, or whose manifest is not signed by whom it should be."""
