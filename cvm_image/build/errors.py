"""What can go wrong while an image is built: the recipe, its lock, a command, or the result."""

from __future__ import annotations

from policies.errors import Refused, Unusable


class UnusableRecipe(Unusable):
    """A recipe that is malformed, or names what is not there."""


class UnusableLock(Unusable):
    """A lock file that is missing, malformed, or not of this recipe."""


class MissingInput(Unusable):
    """An input that is neither in the cache nor to be had where the lock says it comes from."""


class UnusableHost(Unusable):
    """This host lacks a program or a right that building needs."""


class BuildFailed(Refused):
    """A command of the build that failed; the message shows it and its last lines."""


class NotReproduced(Refused):
    """A rebuilt image that differs from the one it should equal; `.reasons` has every difference."""


class InspectionFailed(Refused):
    """An image that does not hold what a locked-down image must; `.reasons` has every finding."""


class BootFailed(Refused):
    """A virtual machine that did not do in time what was waited for."""
