"""An https server on loopback that behaves as a test tells it to, under a certificate authority of its own."""

from __future__ import annotations

import datetime as dt
import ipaddress
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from img2img.fetch import IPAddress

BOUND = 2.0

Behaviour = Callable[[ssl.SSLSocket, "Server"], None]
Resolver = Callable[..., list[tuple[Any, ...]]]


def certificates(folder: Path, name: str) -> tuple[Path, Path]:
    """Write a CA and a chain for `name` that it signed; return the CA's file and the server's file."""
    now = dt.datetime.now(dt.UTC)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())

    def builder(subject: str, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Test CA")]))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(days=1))
            .not_valid_after(now + dt.timedelta(days=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        )

    usage = {
        "digital_signature": False,
        "content_commitment": False,
        "key_encipherment": False,
        "data_encipherment": False,
        "key_agreement": False,
        "key_cert_sign": False,
        "crl_sign": False,
        "encipher_only": False,
        "decipher_only": False,
    }
    ca = (
        builder("Test CA", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage | {"key_cert_sign": True, "crl_sign": True}), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    leaf = (
        builder(name, key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage | {"digital_signature": True}), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    ca_file, server_file = folder / f"{name}-ca.pem", folder / f"{name}.pem"
    ca_file.write_bytes(ca.public_bytes(pem))
    server_file.write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()) + leaf.public_bytes(pem)
    )
    return ca_file, server_file


class Server:
    """A loopback server: the request's path chooses how it behaves."""

    def __init__(self, certificate: Path | None, address: str = "127.0.0.1", port: int = 0) -> None:
        self.behaviours: dict[str, Behaviour] = {}
        self.requests: list[str] = []
        self.accepted = 0
        self.stopping = threading.Event()
        self._context: ssl.SSLContext | None = None
        if certificate:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(certificate)
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            if self.stopping.is_set():
                connection.close()
                return
            self.accepted += 1
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(BOUND)
        with connection, suppress(OSError):
            if self._context is None:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                return
            with self._context.wrap_socket(connection, server_side=True) as sock:
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    piece = sock.recv(4096)
                    if not piece:
                        return
                    request += piece
                self.requests.append(request.decode("ascii"))
                path = request.split(b" ")[1].decode("ascii")
                self.behaviours[path](sock, self)
                sock.unwrap()

    def close(self) -> None:
        self.stopping.set()
        with suppress(OSError), socket.create_connection(self._listener.getsockname(), 1):
            pass
        for thread in self._threads:
            thread.join()
        self._listener.close()


def resolver(*addresses: str) -> Resolver:
    """Return a resolver that answers these addresses for every host."""

    def resolve(host: str, port: int, **_: Any) -> list[tuple[Any, ...]]:
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in addresses
        ]

    return resolve


def loopback(address: IPAddress) -> bool:
    return address == ipaddress.ip_address("127.0.0.1")


def answer(head: str, body: bytes = b"") -> Behaviour:
    """Answer with these lines, and this body."""
    raw = head.replace("\n", "\r\n").encode() + b"\r\n\r\n" + body
    return lambda sock, server: sock.sendall(raw)


def ok(body: bytes, headers: str = "") -> Behaviour:
    return answer(f"HTTP/1.1 200 OK\nContent-Length: {len(body)}{headers}", body)


def redirect(location: str, status: int = 302) -> Behaviour:
    return answer(f"HTTP/1.1 {status} Found\nContent-Length: 0\nLocation: {location}")


def repeat(head: bytes, piece: bytes, pause: float = 0.0) -> Behaviour:
    """Send `head`, then `piece` again and again until the client goes away."""

    def behave(sock: ssl.SSLSocket, server: Server) -> None:
        sock.sendall(head)
        while not server.stopping.wait(pause):
            sock.sendall(piece)

    return behave
