"""What a device believes: the charter that verifies itself from a pinned root, and the gateway that the charter admits.

Nothing else is pinned: no gateway's key, no certificate, no address. Pure but for the clock that its caller gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from typing import Any, Final

from attestation.canonical import read_json_object, unb64
from attestation.errors import PeerRefused
from attestation.hybrid import PUBLIC_SIZE
from attestation.introduction import read_introduction
from fl.edge.messages import PROOF_TYPE, Task
from fl.edge.sealing import key_id
from fl.edge.task import task_digest
from policies.charter import Charter, load_charter
from policies.charter.store import FILE_COUNT_LIMIT, FILE_LIMIT, STORE_LIMIT
from policies.errors import CharterRefused, Refused, SealwrightError, Unusable

MAX_CHARTER: Final = 2 * STORE_LIMIT


@dataclass(frozen=True, slots=True)
class GatewayProof:
    """An attested gateway, and the group key to which messages are sealed. `until`: when its EARs end."""

    name: str
    group_key: bytes = field(repr=False)
    until: datetime


class Trust:
    """A device's trust: `root` is the charter's first root (1.root.json), the one thing that an app carries."""

    def __init__(self, root: bytes, *, production: bool = True) -> None:
        """In `production` a charter for the virtual platform is refused."""
        self._root = root
        self._production = production
        self._charter: Charter | None = None
        self.id = sha256(root).hexdigest()
        """The charter's id."""

    @property
    def version(self) -> int | None:
        """The newest version of the charter that the device has seen; None: none yet."""
        return None if self._charter is None else self._charter.version

    def charter(self, at: datetime) -> Charter:
        """The charter, if it still holds at `at`. Raises CharterRefused."""
        if self._charter is None or at >= self._charter.expires:
            raise CharterRefused("the device has no charter that holds now", where="charter", do="Fetch it.")
        return self._charter

    def follow(self, raw: bytes, at: datetime) -> Charter:
        """Take the charter in the answer to `GET charter`, never an older one than before.

        Raises CharterRefused with every reason, Unusable for what is no charter at all.
        """
        charter = load_charter(_files(raw), self._root, at, known=self._charter)
        if self._production and charter.consortium.platform == "virtual":
            raise CharterRefused(
                "the charter is for the virtual platform, which keeps nothing from its host",
                where="charter",
                do="Use a charter for hardware, or run the device for development.",
            )
        self._charter = charter
        return charter

    def appraise(self, raw: bytes, nonce: str, at: datetime) -> GatewayProof:
        """The gateway that answered `POST proof` over our `nonce`. Raises PeerRefused with every reason.

        Checked: EARs of k brokers over its signing key (affirming, of now, of this charter and platform), its place
        `gateway` and its image in the charter, its signature, and that its word is over this nonce and charter.
        """
        charter = self.charter(at)
        found = read_introduction(raw, charter, at, role="gateway", typ=PROOF_TYPE)
        name = found.ears[0].subject.name
        word, reasons = found.word, []
        if word.get("nonce") != nonce:
            reasons.append("its word is over another nonce")
        if not isinstance(word.get("charter"), dict) or word["charter"].get("id") != charter.id:
            reasons.append("its word is about another charter")
        if self._production and any(ear.document.platform == "virtual" for ear in found.ears):
            reasons.append("it runs on the virtual platform, which keeps nothing from its host")
        group_key = b""
        try:
            group_key = unb64(str(word.get("group_key")), where="group key")
        except SealwrightError:
            reasons.append("its group key is malformed")
        if len(group_key) != PUBLIC_SIZE or word.get("key_id") != key_id(group_key).hex():
            reasons.append("its group key is not the one that it names")
        if reasons:
            raise PeerRefused(tuple(reasons), who=f"gateway {name}")
        return GatewayProof(name, group_key, min(ear.expires_at for ear in found.ears))

    def admit(self, task: Task, at: datetime) -> None:
        """Check that the charter approves this task for its job now. Raises Refused.

        That the graph is the one of the task is checked when it has been fetched, by its blob's digest.
        """
        digest = task_digest(task.name, task.format, task.graph.sha256, task.config)
        approval = self.charter(at).device_task(digest)
        reasons = []
        if digest != task.digest:
            reasons.append("its parts do not have the digest that it names")
        if approval is None:
            reasons.append(f"the charter approves no device task {digest}")
        elif approval.job != task.name:
            reasons.append(f"it is approved for the job {approval.job}, not {task.name}")
        elif approval.expires <= at:
            reasons.append("its approval has expired")
        if reasons:
            raise Refused(
                f"the task may not run here: {reasons[0]}",
                where="task",
                do="Have it approved: target code/device-DIGEST.json of the charter.",
                reasons=tuple(reasons),
            )


def _files(raw: bytes) -> Mapping[str, bytes]:
    files: Any = read_json_object(raw, where="charter", limit=MAX_CHARTER).get("files")
    if not isinstance(files, dict) or len(files) > FILE_COUNT_LIMIT:
        raise Unusable("this is no charter's store", where="charter", do="Check the gateway's version.")
    store = {}
    for name, text in files.items():
        if not isinstance(text, str) or len(text) > 2 * FILE_LIMIT:
            raise Unusable("this is no charter's store", where="charter", do="Check the gateway's version.")
        store[name] = unb64(text, where="charter")
    return store
