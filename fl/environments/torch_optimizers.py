"""What torch imports at the first step of an optimizer: more than a second that many clients spend once, not each."""

from __future__ import annotations

import contextlib

import torch

with contextlib.suppress(ImportError):  # a part of torch that another version may not have
    import torch._dynamo

__all__ = ["torch"]
