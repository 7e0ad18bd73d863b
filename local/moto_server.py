"""`python -m local.moto_server`: moto's AWS on a loopback port of its own, which it prints; ends with its parent."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

# Read by moto when it is imported: buckets are addressed by path here, and answer browsers by their own CORS rules, as
# S3 does.
os.environ.update(S3_IGNORE_SUBDOMAIN_BUCKETNAME="true", MOTO_DISABLE_GLOBAL_CORS="true")

from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import (
    DomainDispatcherApplication,
    MotoRequestHandler,
    create_backend_app,
)
from werkzeug.serving import make_server

from local.s3_notices import add_sequencers
from local.upload_forms import UploadForms

StartResponse = Callable[..., Any]


class _Quiet(MotoRequestHandler):
    def log(self, type: str, message: str, *args: Any) -> None:  # noqa: A002 (the base class's name)
        if type == "error":
            super().log(type, message, *args)


class _Serialised:
    """Makes each DynamoDB call atomic: moto checks a condition and writes in two steps, which threads can part."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: StartResponse) -> Iterable[bytes]:
        if environ.get("HTTP_X_AMZ_TARGET", "").startswith("DynamoDB"):
            with self._lock:
                return list(self._app(environ, start_response))
        answer: Iterable[bytes] = self._app(environ, start_response)
        return answer


def _posting_origins(bucket: str) -> Iterable[str]:
    from moto.s3.models import s3_backends  # loaded with the first request, not at the start

    found = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets.get(bucket)
    for rule in found.cors if found else ():
        if "POST" in rule.allowed_methods:
            yield from [rule.allowed_origins] if isinstance(rule.allowed_origins, str) else rule.allowed_origins


def _end_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main() -> None:
    # The terminal's Ctrl-C reaches the parent, which ends this process when it is done with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    add_sequencers()
    server = make_server(
        "127.0.0.1",
        0,
        _Serialised(UploadForms(DomainDispatcherApplication(create_backend_app), _posting_origins)),
        threaded=True,
        request_handler=_Quiet,
    )
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["MOTO_PORT"] = str(server.server_port)
    print(server.server_port, flush=True)
    # The first call to CloudFormation would load half of moto; here that goes on while the parent reads the template.
    for service in ("cloudformation.parsing", "dynamodb.models", "s3.models", "secretsmanager.models"):
        importlib.import_module(f"moto.{service}")
    importlib.import_module("local.moto_speed").make_fast()
    server.serve_forever()


if __name__ == "__main__":
    main()
