"""A job's large files at a site: pulled before its script starts, checked, in memory until its sandbox has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Final, Protocol

from fl.errors import ApprovalRefused
from fl.jobs.large_files import SLOWEST, LargeFile
from fl.transport.frames import Fetch
from fl.transport.memory import SealedMemory
from fl.transport.spool import memory_part

FILE_SECONDS: Final = 60.0
"""How long a file may take to come, beside what its size allows."""


class Pulls(Protocol):
    """What transfers come by (`fl.site.job.ServerLink`)."""

    def fetch(self, what: Fetch, *, size: int, seconds: float, sha256: str | None = None) -> SealedMemory:
        """Pull a transfer, whose digest has to be `sha256` if that is given. Raises PeerLost, MalformedMessage."""


@contextmanager
def pulled_files(link: Pulls, files: tuple[LargeFile, ...], job: str, site: str) -> Iterator[dict[str, SealedMemory]]:
    """The job's large files by path, each of the digest that its approved bundle names. They go with the context.

    Raises ApprovalRefused for more than fits into memory here, MalformedMessage for other bytes, PeerLost.
    """
    total, most = sum(file.size for file in files), memory_part()
    if total > most:
        raise ApprovalRefused(job, (f"its files have {total} bytes, of which {most} fit into the memory of {site}",))
    with ExitStack() as held:
        found: dict[str, SealedMemory] = {}
        for file in files:
            request = Fetch(job=job, what="file", sha256=file.sha256, offset=0)
            seconds = FILE_SECONDS + file.size / SLOWEST
            memory = link.fetch(request, size=file.size, seconds=seconds, sha256=file.sha256)
            found[file.path] = held.enter_context(memory)
        yield found
