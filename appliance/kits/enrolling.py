"""What a plan asks members to sign: its images as they lie in their folders, its guests' places, its users."""

from __future__ import annotations

import hashlib
from pathlib import Path

from appliance.charter_files import read_file
from appliance.kits.plan import Plan, PlannedImage, enrolment_of
from appliance.kits.user_keys import user_of_request
from cvm_image.manifest import MANIFEST
from cvm_image.verify import changed_files, load_image
from policies.charter import Charter
from policies.documents import Document, ImageReference, ReferenceMeasurement
from policies.errors import Refused, Unusable


def planned_documents(plan: Plan, charter: Charter, folder: Path) -> list[Document]:
    """Every document that the plan needs in `charter`; files are named relative to `folder`.

    Raises Refused for an image folder whose files are not what its manifest says, and Unusable for what cannot be read.
    """
    documents: list[Document] = [image_reference(image, charter, folder / image.folder) for image in plan.images]
    documents += [enrolment_of(guest, plan, charter) for guest in plan.guests]
    for user in plan.users:
        path = folder / user.request
        raw = read_file(path, 1 << 20)
        documents.append(user_of_request(raw, str(path), member=user.member, name=user.name, rights=user.granted()))
    return documents


def image_reference(image: PlannedImage, charter: Charter, folder: Path) -> ImageReference:
    """An image as the charter is to approve it, out of its folder."""
    manifest = load_image(folder)
    if manifest.name != image.name or manifest.platform != charter.consortium.platform:
        raise Unusable(
            f"this is the image {manifest.name} for {manifest.platform}",
            where=str(folder),
            do=f"The plan wants {image.name}, and the charter is {charter.consortium.platform}.",
        )
    reasons = changed_files(folder, manifest)
    if reasons:
        raise Refused(
            "the image is not what its manifest says",
            where=str(folder),
            do="Get the image again from its builder.",
            reasons=tuple(reasons),
        )
    return ImageReference(
        name=manifest.name,
        platform=manifest.platform,
        manifest_sha256=hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest(),
        svn=manifest.svn,
        measurements=tuple(ReferenceMeasurement(**value.model_dump()) for value in manifest.measurements),
        roles=image.roles,
    )
