"""Objects in S3: key layout, presigned URLs, reads and writes.

Uploads bucket: `uploads/<team>/<upload id>`, `inputs/<team>/<job>.png`, and what starts jobs and is never written here:
`inbox/<team>/<preset>/<name>`, `awaited/<team>/<job>`. Results bucket: `results/<team>/<job>/<index>.<extension>`,
`outbox/<team>/<preset>/<name>...`. Two buckets, so a result can never start a job.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from botocore.exceptions import ClientError

from img2img import images
from img2img.aws import error_code
from img2img.errors import NotFound, UnsupportedImage
from img2img.jobs.job import Job, Output, OutputStatus, Source

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


# Of an archived object, and of one that was put with a key of the customer's own.
_UNREADABLE = ("InvalidObjectState", "InvalidRequest")


class Storage:
    """The two buckets of a deployment."""

    def __init__(
        self,
        client: S3Client,
        *,
        uploads_bucket: str,
        results_bucket: str,
        max_image_bytes: int,
        result_url_ttl: int,
        upload_url_ttl: int,
    ) -> None:
        self._client = client
        self._uploads = uploads_bucket
        self._results = results_bucket
        self._max_image_bytes = max_image_bytes
        self._result_url_ttl = result_url_ttl
        self._upload_url_ttl = upload_url_ttl

    @staticmethod
    def _upload_key(team: str, upload_id: str) -> str:
        return f"uploads/{team}/{upload_id}"

    @staticmethod
    def _input_key(team: str, job_id: str) -> str:
        return f"inputs/{team}/{job_id}.png"

    @staticmethod
    def _results_prefix(team: str, job_id: str) -> str:
        return f"results/{team}/{job_id}/"

    def presigned_upload(self, team: str, upload_id: str, content_type: str) -> dict[str, Any]:
        """Return `url` and `fields` of a presigned POST of one upload."""
        return self._presigned_post(self._upload_key(team, upload_id), content_type, self._upload_url_ttl)

    def awaited_source(self, team: str, job_id: str, preset: str) -> Source:
        """Return where the upload of a job is to come."""
        return Source(bucket=self._uploads, key=f"awaited/{team}/{job_id}", version="", preset=preset)

    def presigned_source(self, source: Source, content_type: str, *, seconds: int) -> dict[str, Any]:
        """Return `url` and `fields` of a presigned POST of the upload that starts a job."""
        return self._presigned_post(source.key, content_type, seconds)

    def _presigned_post(self, key: str, content_type: str, seconds: int) -> dict[str, Any]:
        # For exactly this key, type and size.
        return self._client.generate_presigned_post(
            self._uploads,
            key,
            Fields={"Content-Type": content_type},
            Conditions=[{"Content-Type": content_type}, ["content-length-range", 1, self._max_image_bytes]],
            ExpiresIn=seconds,
        )

    def put_upload(self, team: str, upload_id: str, data: bytes, content_type: str) -> None:
        """Store an upload that came in a request body."""
        self._client.put_object(
            Bucket=self._uploads, Key=self._upload_key(team, upload_id), Body=data, ContentType=content_type
        )

    def get_upload(self, team: str, upload_id: str) -> bytes:
        """Return an upload of this team.

        Raises `NotFound`, also for another team's upload, and `TooLarge` before reading, whatever the presigned
        policy said.
        """
        try:
            answer = self._client.get_object(Bucket=self._uploads, Key=self._upload_key(team, upload_id))
        except ClientError as error:
            if error_code(error) not in ("NoSuchKey", "404"):
                raise
            raise NotFound.of_field("image", f"there is no upload {upload_id}; it may not have been sent yet") from None
        with closing(answer["Body"]) as body:
            images.refuse_larger(answer["ContentLength"], self._max_image_bytes)
            return body.read()

    def get_new_object(self, key: str, *, etag: str, version_id: str) -> tuple[bytes, Mapping[str, str]] | None:
        """Return the bytes and metadata of one version of an object, None when it is not what stands there any more.

        Raises `TooLarge` before reading, and `UnsupportedImage` for what S3 will never give.
        """
        which: dict[str, Any] = {"VersionId": version_id} if version_id else {"IfMatch": etag}
        try:
            answer = self._client.get_object(Bucket=self._uploads, Key=key, **which)
        except ClientError as error:
            if error_code(error) in _UNREADABLE:
                raise UnsupportedImage("The file is archived, or encrypted with a key of its sender's") from None
            if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (404, 412):
                raise
            return None
        with closing(answer["Body"]) as body:
            images.refuse_larger(answer["ContentLength"], self._max_image_bytes)
            return body.read(), answer["Metadata"]

    def put_input(self, team: str, job_id: str, png: bytes) -> None:
        """Store the picture that a job sends to its backend."""
        self._client.put_object(
            Bucket=self._uploads, Key=self._input_key(team, job_id), Body=png, ContentType="image/png"
        )

    def get_input(self, job: Job) -> bytes:
        """Return the picture that a job sends to its backend."""
        answer = self._client.get_object(Bucket=self._uploads, Key=self._input_key(job.team, job.id))
        with closing(answer["Body"]) as body:
            return body.read()

    def put_output(self, job: Job, index: int, data: bytes, picture: images.Picture, seconds: float) -> Output:
        """Store one generated picture; what a crash would lose otherwise goes into the object's metadata."""
        output = Output(
            index=index,
            status=OutputStatus.SUCCEEDED,
            seed=job.params.seed_of(index),
            key=f"{self._results_prefix(job.team, job.id)}{index}.{images.EXTENSIONS[picture.content_type]}",
            content_type=picture.content_type,
            width=picture.width,
            height=picture.height,
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            seconds=seconds,
        )
        self._client.put_object(
            Bucket=self._results,
            Key=output.key,
            Body=data,
            ContentType=output.content_type,
            Metadata={
                "width": str(output.width),
                "height": str(output.height),
                "sha256": output.sha256,
                "seconds": str(seconds),
            },
        )
        return output

    def stored_outputs(self, job: Job) -> list[Output]:
        """Return the outputs that an earlier, crashed attempt stored: one list, and a head for each object."""
        prefix = self._results_prefix(job.team, job.id)
        outputs = []
        for item in self._client.list_objects_v2(Bucket=self._results, Prefix=prefix).get("Contents", []):
            # Nothing else lies there, but what a newer version may have put beside them.
            if not (named := re.fullmatch(r"([0-3])\.\w+", item["Key"].removeprefix(prefix))):
                continue
            head = self._client.head_object(Bucket=self._results, Key=item["Key"])
            index = int(named[1])
            outputs.append(
                Output(
                    index=index,
                    status=OutputStatus.SUCCEEDED,
                    seed=job.params.seed_of(index),
                    key=item["Key"],
                    content_type=head["ContentType"],
                    width=int(head["Metadata"]["width"]),
                    height=int(head["Metadata"]["height"]),
                    bytes=head["ContentLength"],
                    sha256=head["Metadata"]["sha256"],
                    seconds=float(head["Metadata"]["seconds"]),
                )
            )
        return outputs

    def get_output(self, output: Output) -> bytes:
        """Return a generated picture."""
        answer = self._client.get_object(Bucket=self._results, Key=output.key)
        with closing(answer["Body"]) as body:
            return body.read()

    def output_url(self, output: Output) -> str:
        """Return a presigned URL of a generated picture."""
        return self._client.generate_presigned_url(
            "get_object", Params={"Bucket": self._results, "Key": output.key}, ExpiresIn=self._result_url_ttl
        )

    def copy_output(self, output: Output, key: str, metadata: Mapping[str, str]) -> None:
        """Copy a generated picture within the bucket of results; its bytes do not come here."""
        self._client.copy_object(
            Bucket=self._results,
            Key=key,
            CopySource={"Bucket": self._results, "Key": output.key},
            ContentType=output.content_type,
            Metadata=metadata,
            MetadataDirective="REPLACE",
        )

    def put_document(self, key: str, document: Mapping[str, Any]) -> None:
        """Store a JSON document in the bucket of results."""
        body = json.dumps(document, ensure_ascii=False, indent=2).encode()
        self._client.put_object(Bucket=self._results, Key=key, Body=body, ContentType="application/json")

    def delete_document(self, key: str) -> None:
        """Delete what `copy_output` or `put_document` stored."""
        self._client.delete_object(Bucket=self._results, Key=key)

    def delete_job(self, job: Job) -> None:
        """Delete a job's upload, if it had one of its own, its input and outputs; what is gone is no error."""
        if job.source and job.source.key.startswith("awaited/"):
            self._client.delete_object(Bucket=self._uploads, Key=job.source.key)
        self.delete_input(job.team, job.id)
        self.delete_outputs(job.team, job.id)

    def delete_input(self, team: str, job_id: str) -> None:
        """Delete the picture that a job would have sent."""
        self._client.delete_object(Bucket=self._uploads, Key=self._input_key(team, job_id))

    def delete_outputs(self, team: str, job_id: str) -> None:
        """Delete what a job stored as results. At most four samples: one page holds them."""
        found = self._client.list_objects_v2(Bucket=self._results, Prefix=self._results_prefix(team, job_id))
        for item in found.get("Contents", []):
            self._client.delete_object(Bucket=self._results, Key=item["Key"])
