"""Take an image in: straight to S3 with a presigned POST, or in a request body."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from img2img import images
from img2img.errors import InvalidRequest
from img2img.ids import new_id
from img2img.params import one_of, parse_fields

if TYPE_CHECKING:
    from img2img.bootstrap import Services


@dataclass(frozen=True)
class StoredUpload:
    """An upload that is stored and known to be an image."""

    id: str
    image: images.ImageInfo
    bytes: int


def _new_upload_id(services: Services) -> str:
    return f"upl_{new_id(int(services.clock() * 1000))}"


def announce(services: Services, team: str, body: Any) -> dict[str, Any]:
    """Return a presigned POST for one image: `id`, `url`, `fields`, `method`, `max_bytes`, `expires_in` (seconds).

    `body` may name the `content_type`, else it is JPEG. Raises `InvalidRequest`.
    """
    if not isinstance(body, dict):
        raise InvalidRequest.of_field("body", "must be a JSON object")
    values, errors = parse_fields(body, {"content_type": one_of(images.ACCEPTED_CONTENT_TYPES)})
    if errors:
        raise InvalidRequest.of_fields(errors)
    content_type = values.get("content_type", "image/jpeg")
    upload_id = _new_upload_id(services)
    return {
        "id": upload_id,
        "method": "POST",
        **services.storage.presigned_upload(team, upload_id, content_type),
        "max_bytes": services.settings.max_image_bytes,
        "expires_in": services.settings.upload_url_ttl,
    }


def store(services: Services, team: str, data: bytes) -> StoredUpload:
    """Store an image that came in a request body. Raises `TooLarge` and `UnsupportedImage`."""
    images.refuse_larger(len(data), services.settings.max_image_bytes, field="body")
    info = images.inspect(data, max_pixels=services.settings.max_image_pixels)
    upload_id = _new_upload_id(services)
    services.storage.put_upload(team, upload_id, data, info.content_type)
    return StoredUpload(upload_id, info, len(data))
