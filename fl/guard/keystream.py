"""Secret random numbers in bulk, from a key: AES-256 in counter mode, as NumPy arrays.

The counter mode is that of GCM (NIST SP 800-38D, section 6.5, GCTR) over zeros, whose tag nobody asks for: processors
with AES on whole vectors make half as much again of it as of plain counter mode (SP 800-38A). A stretch of the stream
is what one initialisation vector gives, 0 first, then 1 and so on. One key gives one stream, and the stream is read
once: whoever has the key has the numbers.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import AEADEncryptionContext, Cipher, algorithms, modes

KEY_SIZE: Final = 32
STRETCH: Final = 2 << 20
"""Bytes of one initialisation vector: where another hand may take the stream up."""
SLACK: Final = 15
"""Bytes behind its own that the cipher wants room for and does not touch."""
_ZEROS: Final = memoryview(bytes(STRETCH))


class Keystream:
    """The stream of one key."""

    def __init__(self, key: bytes, stretch: int = 0) -> None:
        """`key` has KEY_SIZE bytes; `stretch` is the one that comes first, of STRETCH bytes each."""
        self._algorithm = algorithms.AES256(key)
        self._stretches = stretch
        self._left = 0
        self._encryptor: AEADEncryptionContext

    def fill(self, target: npt.NDArray[np.uint8], size: int) -> None:
        """Write the stream's next `size` bytes over the first of a contiguous array, which has SLACK more."""
        done = 0
        while done < size:
            if not self._left:
                vector = self._stretches.to_bytes(12, "big")
                self._encryptor = Cipher(self._algorithm, modes.GCM(vector)).encryptor()
                self._stretches, self._left = self._stretches + 1, STRETCH
            part = min(size - done, self._left)
            self._encryptor.update_into(_ZEROS[:part], target[done:].data)
            done, self._left = done + part, self._left - part

    def words(self, count: int, dtype: type[np.unsignedinteger[Any]] = np.uint64) -> npt.NDArray[Any]:
        """The next `count` unsigned integers, uniform over all of `dtype`."""
        size = count * np.dtype(dtype).itemsize
        target = np.empty(size + SLACK, dtype=np.uint8)
        self.fill(target, size)
        return target[:size].view(dtype)

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """The next `count` numbers of the standard normal distribution (Box and Muller 1958), float64."""
        pairs = -(-count // 2)
        uniform = ((self.words(2 * pairs) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        found: npt.NDArray[np.float64] = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
        return found
