"""What a whole transfer is kept as, wherever it lies: in sealed memory, or encrypted in the spool."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fl.tensors import Source, TensorFile, parse

if TYPE_CHECKING:
    from fl.transport.memory import SealedMemory


class Stored(ABC):
    """Bytes that do not change any more. Its holder closes it."""

    size: int

    @property
    @abstractmethod
    def digest(self) -> str:
        """The content address: lower-case hex SHA-256, computed once."""

    @property
    @abstractmethod
    def view(self) -> memoryview:
        """All bytes, in memory."""

    @abstractmethod
    def pieces(self, offset: int, size: int) -> Iterator[memoryview]:
        """The bytes from `offset` on, in pieces of `size`; the last has fewer."""

    @property
    @abstractmethod
    def source(self) -> memoryview | Source:
        """What `fl.tensors.parse` reads: the bytes, or what reads them a part at a time."""

    def tensors(self) -> TensorFile:
        """Its tensors, uncopied. Raises MalformedTensors as `fl.tensors.parse` does."""
        return parse(self.source, max_size=self.size)

    @abstractmethod
    def share(self) -> Stored:
        """The same once more, with a life of its own; nothing is copied."""

    @abstractmethod
    def in_memory(self) -> SealedMemory:
        """The same in sealed memory, the caller's to close."""

    @abstractmethod
    def close(self) -> None:
        """Give it back."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
