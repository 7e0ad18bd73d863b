"""The floor: both handlers written down straight, with the same calls, bytes and image work, and nothing else.

No framework, no validation, no idempotency, no retry of a sample, no logs, no metrics.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import secrets
import time
from io import BytesIO
from typing import Any

from PIL import Image

_ALPHABET = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_BASE = 1000
_WRITTEN_ONCE = "attribute_not_exists(pk)"
# Which team a key belongs to, and until when that need not be looked up again.
_seen: dict[str, tuple[float, str]] = {}


def _ulid(ms: int) -> str:
    number = ms << 80 | secrets.randbits(80)
    return "".join(_ALPHABET[number >> shift & 31] for shift in range(125, -1, -5))


def fitted(data: bytes, width: int, height: int) -> bytes:
    """Return the middle of a picture at a size, as PNG."""
    image = Image.open(BytesIO(data))
    # `cover`: the middle of the picture in the target's proportions.
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, image.width - left, image.height - top)
    if (drafted := image.draft(None, (int(image.width * scale), int(image.height * scale)))) is not None:
        factor = drafted[1][2] / (2 * left + box[2] - left)
        box = (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)
    picture = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS, box=box, reducing_gap=2.0)
    buffer = BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _team_of(dynamodb: Any, key_id: str) -> str:
    until, team = _seen.get(key_id, (0.0, ""))
    if time.time() < until:
        return team
    table = os.environ["JOBS_TABLE"]
    place = {"pk": {"S": f"KEY#{key_id}"}, "sk": {"S": "KEY"}}
    key = dynamodb.get_item(TableName=table, Key=place, ConsistentRead=True)["Item"]
    team = key["team"]["S"]
    place = {"pk": {"S": f"TEAM#{team}"}, "sk": {"S": "TEAM"}}
    item = dynamodb.get_item(TableName=table, Key=place, ConsistentRead=True)["Item"]
    if not key["enabled"]["BOOL"] or not item["enabled"]["BOOL"]:
        raise PermissionError(key_id)
    _seen[key_id] = (time.time() + 60, team)
    return team


def _account(team: str, condition: str, values: dict[str, Any], *, balance: int, reserved: int, charged: int) -> Any:
    """Return the write that changes a team's account."""
    return {
        "Update": {
            "TableName": os.environ["JOBS_TABLE"],
            "Key": {"pk": {"S": f"TEAM#{team}"}, "sk": {"S": "TEAM"}},
            "UpdateExpression": "ADD balance :balance, reserved :reserved, charged :charged, added :added, "
            "entries :entries",
            "ConditionExpression": condition,
            "ExpressionAttributeValues": {
                ":balance": {"N": str(balance)},
                ":reserved": {"N": str(reserved)},
                ":charged": {"N": str(charged)},
                ":added": {"N": "0"},
                ":entries": {"N": "1"},
                **values,
            },
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }
    }


def _put_once(item: dict[str, Any]) -> Any:
    return {"Put": {"TableName": os.environ["JOBS_TABLE"], "Item": item, "ConditionExpression": _WRITTEN_ONCE}}


def create(clients: dict[str, Any], event: dict[str, Any]) -> dict[str, Any]:
    """Answer `POST /sd1.5-img2img` with `Prefer: respond-async`."""
    context = event["requestContext"]
    team = _team_of(clients["dynamodb"], context["identity"]["apiKeyId"])
    body = json.loads(event["body"])
    params = {
        "prompt": body["prompt"],
        "negative_prompt": body.get("negative_prompt", ""),
        "samples": body.get("samples", 1),
        "scheduler": body.get("scheduler", "DDIM"),
        "num_inference_steps": body.get("num_inference_steps", 20),
        "guidance_scale": body.get("guidance_scale", 7.5),
        "strength": body.get("strength", 1.0),
        "seed": body.get("seed", -1),
        "img_width": body.get("img_width", 512),
        "img_height": body.get("img_height", 512),
        "fit": body.get("fit", "cover"),
        "output_format": body.get("output_format"),
    }
    png = fitted(base64.b64decode(body["image"]), params["img_width"], params["img_height"])
    steps, pixels = params["num_inference_steps"], params["img_width"] * params["img_height"]
    price = -(-_BASE * steps * pixels // (20 * 512 * 512)) * params["samples"]
    ms = int(time.time() * 1000)
    now = ms // 1000
    job_id = _ulid(ms)
    clients["s3"].put_object(
        Bucket=os.environ["UPLOADS_BUCKET"], Key=f"inputs/{team}/{job_id}.png", Body=png, ContentType="image/png"
    )
    item = {
        "pk": {"S": f"TEAM#{team}"},
        "sk": {"S": f"JOB#{job_id}"},
        "key_id": {"S": context["identity"]["apiKeyId"]},
        "correlation_id": {"S": context["requestId"]},
        "status": {"S": "queued"},
        "params": {"S": json.dumps(params)},
        "metadata": {"S": "{}"},
        "backend": {"S": "segmind"},
        "created_ms": {"N": str(ms)},
        "deadline_at": {"N": str(now + 1800)},
        "due_at": {"N": str(now + 60)},
        "open_shard": {"S": f"OPEN#{sum(job_id.encode()) % 4}"},
        "attempts": {"N": "0"},
        "reserved": {"N": str(price)},
        "charged": {"N": "0"},
        "released": {"N": "0"},
        "price_version": {"S": f"1:{_BASE}"},
    }
    in_service = {":true": {"BOOL": True}, ":price": {"N": str(price)}}
    entry = {
        "pk": {"S": f"TEAM#{team}"},
        "sk": {"S": f"LEDGER#{job_id}#reserve"},
        "at_ms": {"N": str(ms)},
        "reserved": {"N": str(price)},
    }
    writes = [
        _put_once(item),
        _account(team, "enabled = :true AND balance >= :price", in_service, balance=-price, reserved=price, charged=0),
        _put_once(entry),
    ]
    clients["dynamodb"].transact_write_items(TransactItems=writes)
    message = {"team": team, "job_id": job_id, "correlation_id": context["requestId"]}
    clients["sqs"].send_message(QueueUrl=os.environ["JOBS_QUEUE_URL"], MessageBody=json.dumps(message))
    url = f"https://{event['headers']['Host']}/v1/jobs/{job_id}"
    document = {
        "id": job_id,
        "status": "queued",
        "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now)),
        "started_at": None,
        "completed_at": None,
        "input": params,
        "backend": "segmind",
        "outputs": [],
        "error": None,
        "metrics": {"queue_ms": None, "backend_ms": None, "total_ms": None},
        "credits": {"reserved": price, "charged": 0, "released": 0, "price_version": f"1:{_BASE}"},
        "metadata": {},
        "urls": {"get": url, "cancel": f"{url}/cancel"},
    }
    headers = {
        "Content-Type": ["application/json"],
        "Location": [url],
        "Preference-Applied": ["respond-async"],
        "Retry-After": ["1"],
        "x-request-id": [context["requestId"]],
        "Access-Control-Allow-Origin": ["*"],
    }
    return {"statusCode": 202, "multiValueHeaders": headers, "body": json.dumps(document), "isBase64Encoded": False}


class Worker:
    """Runs jobs of one sample. The session is its caller's, so that a create need not import `requests`."""

    def __init__(self, clients: dict[str, Any], session: Any, key: str) -> None:
        self._clients = clients
        self._session = session
        self._key = key

    def run(self, event: dict[str, Any]) -> dict[str, Any]:
        """Run the job of the event's only record."""
        message = json.loads(event["Records"][0]["body"])
        job_key = {"pk": {"S": f"TEAM#{message['team']}"}, "sk": {"S": f"JOB#{message['job_id']}"}}
        job = self._claim(job_key)
        params = json.loads(job["params"]["S"])
        found = self._clients["s3"].get_object(
            Bucket=os.environ["UPLOADS_BUCKET"], Key=f"inputs/{message['team']}/{message['job_id']}.png"
        )
        picture = found["Body"].read()
        body = {name: value for name, value in params.items() if name not in ("fit", "output_format")}
        body = {"image": base64.b64encode(picture).decode(), **body, "samples": 1, "base64": False}
        answer = self._session.post(
            f"{os.environ['SEGMIND_BASE_URL']}/sd1.5-img2img",
            json=body,
            headers={"x-api-key": self._key, "Accept": "image/*, application/json", "Accept-Encoding": "identity"},
            timeout=90,
        )
        answer.raise_for_status()
        data = answer.content
        image = Image.open(BytesIO(data))
        black = all(high <= 3 for _, high in image.convert("RGB").getextrema())
        sha256 = hashlib.sha256(data).hexdigest()
        seconds = float(answer.headers["x-generation-time"])
        key = f"results/{message['team']}/{message['job_id']}/0.jpg"
        self._clients["s3"].put_object(
            Bucket=os.environ["RESULTS_BUCKET"],
            Key=key,
            Body=data,
            ContentType="image/jpeg",
            Metadata={
                "width": str(image.width),
                "height": str(image.height),
                "sha256": sha256,
                "seconds": str(seconds),
            },
        )
        output = {
            "index": 0,
            "status": "blocked" if black else "succeeded",
            "seed": params["seed"],
            "error_code": "",
            "error_detail": "",
            "key": key,
            "content_type": "image/jpeg",
            "width": image.width,
            "height": image.height,
            "bytes": len(data),
            "sha256": sha256,
            "seconds": seconds,
        }
        self._finish(message["team"], message["job_id"], job, output)
        return {"batchItemFailures": []}

    def _claim(self, job_key: dict[str, Any]) -> Any:
        ms = int(time.time() * 1000)
        answer = self._clients["dynamodb"].update_item(
            TableName=os.environ["JOBS_TABLE"],
            Key=job_key,
            UpdateExpression="SET #status = :processing, lease = :lease, due_at = :due, "
            "started_ms = if_not_exists(started_ms, :now_ms) ADD attempts :one",
            ConditionExpression="#status = :queued OR (#status = :processing AND attribute_not_exists(lease)) "
            "OR (#status = :processing AND due_at <= :now)",
            ExpressionAttributeNames={"#status": "status"},
            ExpressionAttributeValues={
                ":queued": {"S": "queued"},
                ":processing": {"S": "processing"},
                ":lease": {"S": _ulid(ms)},
                ":due": {"N": str(ms // 1000 + 130)},
                ":now_ms": {"N": str(ms)},
                ":now": {"N": str(ms // 1000)},
                ":one": {"N": "1"},
            },
            ReturnValues="ALL_NEW",
            ReturnValuesOnConditionCheckFailure="ALL_OLD",
        )
        return answer["Attributes"]

    def _finish(self, team: str, job_id: str, job: Any, output: dict[str, Any]) -> None:
        table, ms = os.environ["JOBS_TABLE"], int(time.time() * 1000)
        reserved = int(job["reserved"]["N"])
        charged = reserved if output["status"] == "succeeded" else 0
        released = reserved - charged
        sets = {
            "status": {"S": "succeeded"},
            "completed_ms": {"N": str(ms)},
            "outputs": {"S": json.dumps([output])},
            "backend": job["backend"],
            "backend_reason": {"S": ""},
            "error_code": {"S": ""},
            "error_detail": {"S": ""},
            "reserved": {"N": str(reserved)},
            "charged": {"N": str(charged)},
            "released": {"N": str(released)},
            "expires_at": {"N": str(ms // 1000 + 30 * 86_400)},
        }
        update = {
            "TableName": table,
            "Key": {"pk": {"S": f"TEAM#{team}"}, "sk": {"S": f"JOB#{job_id}"}},
            "UpdateExpression": f"SET {', '.join(f'#{name} = :{name}' for name in sets)} "
            "REMOVE lease, due_at, open_shard, pending, waits_for",
            "ConditionExpression": "#status = :seen AND lease = :held",
            "ExpressionAttributeNames": {f"#{name}": name for name in sets},
            "ExpressionAttributeValues": {
                **{f":{name}": value for name, value in sets.items()},
                ":seen": {"S": "processing"},
                ":held": job["lease"],
            },
        }
        amounts = {
            name: {"N": str(amount)} for name, amount in (("charged", charged), ("released", released)) if amount
        }
        entry = {"pk": {"S": f"TEAM#{team}"}, "sk": {"S": f"LEDGER#{job_id}#settle"}, "at_ms": {"N": str(ms)}}
        day = time.strftime("%Y-%m-%d", time.gmtime(ms // 1000))
        usage = {
            "TableName": table,
            "Key": {
                "pk": {"S": f"TEAM#{team}"},
                "sk": {"S": f"USAGE#{day}#{job['key_id']['S']}#{job['backend']['S']}"},
            },
            "UpdateExpression": "ADD jobs :jobs, succeeded :succeeded, failed :failed, canceled :canceled, "
            "images :images, charged :charged",
            "ExpressionAttributeValues": {
                ":jobs": {"N": "1"},
                ":succeeded": {"N": "1"},
                ":failed": {"N": "0"},
                ":canceled": {"N": "0"},
                ":images": {"N": "1"},
                ":charged": {"N": str(charged)},
            },
        }
        writes = [
            {"Update": update},
            _account(team, "attribute_exists(pk)", {}, balance=released, reserved=-reserved, charged=charged),
            _put_once({**entry, **amounts}),
            {"Update": usage},
        ]
        self._clients["dynamodb"].transact_write_items(TransactItems=writes)
