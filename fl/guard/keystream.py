"""Secret random numbers in bulk, from a key: AES-256 in counter mode (NIST SP 800-38A), as NumPy arrays.

One key and one nonce give one stream, and the stream is read once: whoever has both has the numbers.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

KEY_SIZE: Final = 32
NONCE_SIZE: Final = 16
MAX_FILL: Final = 1 << 20
_ZEROS: Final = memoryview(bytes(MAX_FILL))


class Keystream:
    """The stream of one key and nonce."""

    def __init__(self, key: bytes, nonce: bytes = bytes(NONCE_SIZE)) -> None:
        """`key` has KEY_SIZE bytes, `nonce` is the first counter block."""
        self._encryptor = Cipher(algorithms.AES256(key), modes.CTR(nonce)).encryptor()

    def fill(self, target: npt.NDArray[np.unsignedinteger[Any]]) -> None:
        """Write the stream's next bytes over a contiguous array of at most MAX_FILL bytes."""
        self._encryptor.update_into(_ZEROS[: target.nbytes], target.view(np.uint8).data)

    def words(self, count: int, dtype: type[np.unsignedinteger[Any]] = np.uint64) -> npt.NDArray[Any]:
        """The next `count` unsigned integers, uniform over all of `dtype`."""
        size = count * np.dtype(dtype).itemsize
        target = np.zeros(size, dtype=np.uint8)
        self._encryptor.update_into(target.data, target.data)
        return target.view(dtype)

    def normal(self, count: int) -> npt.NDArray[np.float64]:
        """The next `count` numbers of the standard normal distribution (Box and Muller 1958), float64."""
        pairs = -(-count // 2)
        uniform = ((self.words(2 * pairs) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(uniform[:pairs]))
        angle = 2.0 * np.pi * uniform[pairs:]
        found: npt.NDArray[np.float64] = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]
        return found
