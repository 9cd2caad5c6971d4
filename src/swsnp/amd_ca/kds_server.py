"""The imitated key service on a socket, by the standard library's HTTP server.

For tests and laboratories: it listens on the loopback address unless told otherwise, and has no limits
against abuse. With `control=True` whoever reaches it can make it misbehave:

    GET    /swsnp/asked         the latest requests and their statuses
    GET    /swsnp/misbehave     what is going wrong
    POST   /swsnp/misbehave     one misbehaviour, or a list of them, to come on top
    DELETE /swsnp/misbehave     behave again
"""

from __future__ import annotations

import json
import logging
import socket
import ssl
import threading
from dataclasses import asdict, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any, Final

from swsnp.amd_ca.kds_double import Misbehaviour, Reply, Trouble
from swsnp.errors import HostError, InputError, UsageError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from swsnp.amd_ca.kds_double import KdsDouble

__all__ = ["KdsServer", "misbehaviour_of"]

_logger = logging.getLogger(__name__)
_CONTROL: Final = "/swsnp/"
_BODY_MAX: Final = 1 << 16
_IDLE_S: Final = 60
_FIELDS: Final = {each.name for each in fields(Misbehaviour)}


def misbehaviour_of(values: dict[str, Any]) -> Misbehaviour:
    """A misbehaviour from JSON, or from a command line.

    Raises:
        InputError: an unknown name, a missing trouble, or a value of the wrong kind.
        UsageError: a value out of range.
    """
    if unknown := values.keys() - _FIELDS:
        raise InputError(
            f"misbehaviour: got {', '.join(sorted(unknown))}, wanted {', '.join(sorted(_FIELDS))}"
        )
    try:
        trouble = Trouble(values.get("trouble", ""))
    except ValueError:
        raise InputError(
            f"misbehaviour, trouble: got {values.get('trouble')!r}, wanted one of {', '.join(Trouble)}"
        ) from None
    kinds: dict[str, tuple[type, ...]] = {
        "times": (int, type(None)),
        "pause_s": (int, float),
        "retry_after": (str, type(None)),
        "only": (str,),
    }
    for name, kind in kinds.items():
        if name in values and (not isinstance(values[name], kind) or isinstance(values[name], bool)):
            raise InputError(f"misbehaviour, {name}: got {values[name]!r}")
    return Misbehaviour(**{**values, "trouble": trouble})


class KdsServer:
    """A key service that listens; a context manager that ends with its block.

    Args:
        double: who answers.
        host: address to listen on.
        port: 0 takes a free one.
        control: whether /swsnp/ is there; see the module.
        tls: files with certificate and key (PEM), for clients that insist on https.

    Raises:
        HostError: the address cannot be listened on.
        InputError: the TLS files cannot be used.
    """

    def __init__(
        self,
        double: KdsDouble,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        control: bool = False,
        tls: tuple[Path, Path] | None = None,
    ) -> None:
        self.double = double
        context = None if tls is None else _context(*tls)
        try:
            self._http = _Server((host, port), double, control=control)
        except (OSError, OverflowError) as error:
            raise HostError(f"{host}:{port}: cannot be listened on: {error}") from None
        if context is not None:
            self._http.socket = context.wrap_socket(
                self._http.socket, server_side=True, do_handshake_on_connect=False
            )
        self._scheme = "http" if tls is None else "https"
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """What a client takes as the service's address."""
        host, port = str(self._http.server_address[0]), self._http.server_address[1]
        return f"{self._scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    def serve(self) -> None:
        """Answer until `close` is called from another thread, or an exception comes."""
        self._http.serve_forever(poll_interval=0.1)

    def start(self) -> None:
        """Answer in a thread of its own from now on."""
        self._thread = threading.Thread(target=self.serve, name="key service", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening; answers that wait are given up."""
        self._http.closing.set()
        if self._thread is not None:
            self._http.shutdown()
            self._thread.join()
        self._http.server_close()

    def __enter__(self) -> KdsServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _context(certificate: Path, key: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key)
    except OSError as error:  # ssl.SSLError is one
        raise InputError(f"{certificate}, {key}: cannot be used for TLS: {error}") from None
    return context


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], double: KdsDouble, *, control: bool) -> None:
        self.double = double
        self.control = control
        self.closing = threading.Event()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # not HTTPServer's, which asks the name service who we are and may wait long for that
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # clients that hang up are what this server is for
        _logger.debug("%s: connection ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    server_version = "swsnp"
    sys_version = ""
    timeout = _IDLE_S

    def do_GET(self) -> None:
        """A certificate, a chain, a list; or what happened so far."""
        if self._controls("asked"):
            self._json([asdict(each) for each in self.server.double.asked])
        elif self._controls("misbehave"):
            self._json([asdict(each) for each in self.server.double.misbehaviours])
        else:
            self._reply(self.server.double.answer(self.path))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        """Misbehave."""
        if not self._controls("misbehave"):
            self._refuse()
            return
        try:
            self.server.double.misbehave(*self._misbehaviours())
        except (InputError, UsageError) as error:
            self.close_connection = True  # a body that was not read must not be taken for a request
            self._reply(Reply(status=400, body=f"{error}\n".encode()))
        else:
            self._json([asdict(each) for each in self.server.double.misbehaviours])

    def do_DELETE(self) -> None:
        """Behave."""
        if not self._controls("misbehave"):
            self._refuse()
            return
        self.server.double.misbehave()
        self._json([])

    def _refuse(self) -> None:
        self.close_connection = True  # its body was not read
        self._reply(Reply(status=405, headers=(("Allow", "GET, HEAD"),)))

    def _controls(self, what: str) -> bool:
        return self.server.control and self.path == _CONTROL + what

    def _misbehaviours(self) -> list[Misbehaviour]:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > _BODY_MAX:
            raise InputError(f"Content-Length: got {length!r}, wanted up to {_BODY_MAX} bytes")
        try:
            given = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError) as error:
            raise InputError(f"misbehaviour: not JSON: {error}") from None
        several = given if isinstance(given, list) else [given]
        if not several or not all(isinstance(each, dict) for each in several):
            raise InputError("misbehaviour: wanted a JSON object, or a list of at least one")
        return [misbehaviour_of(each) for each in several]

    def _json(self, value: object) -> None:
        body = json.dumps(value, indent=1).encode() + b"\n"
        self._reply(Reply(status=200, content_type="application/json", body=body))

    def _reply(self, reply: Reply) -> None:
        if reply.pause_s and not reply.drips:
            self.server.closing.wait(reply.pause_s)
        if not reply.status:
            self.close_connection = True
            return
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Content-Length", str(len(reply.body)))
        for name, value in reply.headers:
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self._send_body(reply)

    def _send_body(self, reply: Reply) -> None:
        body = reply.body[: reply.sent]
        step = 1 if reply.drips else max(len(body), 1)
        for at in range(0, len(body), step):
            if reply.drips and self.server.closing.wait(reply.pause_s):
                break
            self.wfile.write(body[at : at + step])
            self.wfile.flush()
        if len(body) < len(reply.body) or self.server.closing.is_set():
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        _logger.debug("%s: " + format, self.client_address[0], *args)
