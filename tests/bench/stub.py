"""AWS and Segmind as one server that answers at once, in a process of its own: its CPU time is nobody's.

It checks nothing and keeps nothing but what was asked for and how many bytes came: `GET /seen` tells, and forgets.

    python -m tests.bench.stub FOLDER    prints its port; ends with its standard input
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import socket
import sys
import threading
from typing import Any

from tests.bench.setting import INPUT_FILE, OUTPUT_FILE, SEGMIND_PATH, claimed_item, key_item, team_item

JSON = "application/x-amz-json-1.0"


class _Stub:
    def __init__(self, folder: pathlib.Path) -> None:
        self._input = (folder / INPUT_FILE).read_bytes()
        self._output = (folder / OUTPUT_FILE).read_bytes()
        self._claimed = json.dumps({"Attributes": claimed_item()}).encode()
        self._seen: list[tuple[str, int]] = []

    def answer(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        if path == "/seen":
            seen, self._seen = self._seen, []
            return _response(JSON, json.dumps(seen).encode())
        target = headers.get("x-amz-target", "").rpartition(".")[2]
        self._seen.append((target or f"{method} {path.split('/')[1]}", len(body)))
        match target:
            case "UpdateItem":
                return _response(JSON, self._claimed)
            case "GetItem":
                wanted = json.loads(body)["Key"]["sk"]["S"]
                item = {"KEY": key_item, "TEAM": team_item}[wanted]()
                return _response(JSON, json.dumps({"Item": item}).encode())
            case "SendMessage":
                message = json.loads(body)["MessageBody"].encode()
                digest = hashlib.md5(message, usedforsecurity=False).hexdigest()
                return _response(JSON, json.dumps({"MessageId": "m-1", "MD5OfMessageBody": digest}).encode())
            case "GetSecretValue":
                secret = {"Name": "segmind", "VersionId": "v-1", "SecretString": "SG_0123456789abcdef"}
                return _response(JSON, json.dumps(secret).encode())
            case name if name:
                return _response(JSON, b"{}")
        if path.endswith(SEGMIND_PATH):
            paid = {"x-generation-time": "2.345", "x-remaining-credits": "99.5", "x-request-id": "r-1"}
            return _response("image/jpeg", self._output, paid)
        if method == "GET":
            return _response(
                "image/png", self._input, {"ETag": '"0"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}
            )
        return _response("application/xml", b"", {"ETag": '"0"'})

    def serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb", 1 << 20) as reader:
            while first := reader.readline().split():
                headers = {}
                while (line := reader.readline()) not in (b"\r\n", b""):
                    name, _, value = line.decode("latin-1").partition(":")
                    headers[name.lower()] = value.strip()
                if headers.get("expect"):
                    connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                body = reader.read(int(headers.get("content-length", 0)))
                connection.sendall(self.answer(first[0].decode(), first[1].decode(), headers, body))


def _response(content_type: str, body: bytes, more: dict[str, Any] | None = None) -> bytes:
    lines = {"Content-Type": content_type, "Content-Length": len(body), "x-amzn-RequestId": "0", **(more or {})}
    return "".join(["HTTP/1.1 200 OK\r\n", *(f"{k}: {v}\r\n" for k, v in lines.items()), "\r\n"]).encode() + body


def _listen(listener: socket.socket, stub: _Stub) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=stub.serve, args=(connection,), daemon=True).start()


def main() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    threading.Thread(target=_listen, args=(listener, _Stub(pathlib.Path(sys.argv[1]))), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
