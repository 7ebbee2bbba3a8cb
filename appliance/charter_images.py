"""From an image folder to what a charter says of it: `images/NAME.json`, the reference values that members sign."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from policies.errors import Unusable


def image_targets(images: Iterable[Path], builder: Path | None, roles: Iterable[str]) -> dict[str, bytes]:
    """The target files for image folders, each verified against its builder's key first.

    `roles` are those that guests of these images may have. Raises ImageRefused for an image that does not verify, and
    Unusable if builder or roles are missing.
    """
    from cvm_image.files import read_public_key
    from cvm_image.manifest import MANIFEST
    from cvm_image.verify import file_digest, verify_image
    from policies.charter.written import written_target
    from policies.documents import ReferenceMeasurement

    named = tuple(roles)
    targets: dict[str, bytes] = {}
    for folder in images:
        if builder is None:
            raise Unusable("the image's builder is not named", where="--image", do="Give its key: --builder FILE.")
        if not named:
            raise Unusable("the image has no role", where="--image", do="Say which: --role server --role site.")
        manifest = verify_image(folder, read_public_key(builder))
        table = {
            "name": manifest.name,
            "platform": manifest.platform,
            "manifest_sha256": file_digest(folder / MANIFEST),
            "svn": manifest.svn,
            "measurements": [
                {name: getattr(one, name) for name in ReferenceMeasurement.model_fields}
                for one in manifest.measurements
            ],
            "roles": list(named),
        }
        path = f"images/{manifest.name}.json"
        targets[path] = written_target(path, json.dumps(table).encode(), str(folder))
    return targets
