"""One HTTP request to the key service, by urllib3 (extra `kds`), which is loaded when the first one is made.

What came back is data, whatever its status; only what is no answer at all is an error. No redirect is
followed, no answer is read further than its limit, and none takes longer than its time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol
from urllib.parse import urlsplit

from swsnp._version import __version__
from swsnp.certs.kds_errors import KdsContentError, KdsTimeout, KdsTruncated, KdsUnreachable
from swsnp.errors import HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from urllib3 import BaseHTTPResponse, PoolManager

__all__ = ["HttpAnswer", "HttpTransport", "Transport"]

_CHUNK: Final = 1 << 14
_HEADERS: Final = {
    "User-Agent": f"swsnp/{__version__}",
    "Accept": "*/*",
    "Accept-Encoding": "identity",  # nothing is worth compressing, and nothing can then expand
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """Status, headers with names in lower case, and the whole body."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)


class Transport(Protocol):
    """What the client needs of HTTP."""

    def get(self, url: str, *, timeout_s: float, limit: int) -> HttpAnswer:
        """One GET.

        Args:
            url: what to ask for.
            timeout_s: for connecting and for the whole body.
            limit: bytes of body that are accepted.

        Raises:
            KdsUnavailable: there is no whole answer; its subclass says why.
            KdsContentError: there are more than `limit` bytes.
        """


class HttpTransport:
    """HTTP and HTTPS by urllib3; connections are kept for the next request. Threads may share it.

    A proxy is taken from the environment (`https_proxy`, `http_proxy`, `no_proxy`), as other tools do.

    Args:
        ca_file: certificates (PEM) that a service's TLS certificate may come from, in place of the system's.
        monotonic: the clock that timeouts are measured with.
    """

    def __init__(
        self, *, ca_file: Path | None = None, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._ca_file = ca_file
        self._monotonic = monotonic
        self._pools: dict[str | None, PoolManager] = {}

    def get(self, url: str, *, timeout_s: float, limit: int) -> HttpAnswer:
        """One GET; see `Transport`."""
        pool = self._pool_for(url)
        import urllib3
        from urllib3 import exceptions

        deadline = self._monotonic() + timeout_s
        try:
            response = pool.request(
                "GET",
                url,
                headers=_HEADERS,
                timeout=urllib3.Timeout(total=timeout_s),
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
            try:
                body = self._body(url, response, deadline, timeout_s, limit)
            finally:
                response.release_conn()
        except (
            exceptions.NewConnectionError
        ) as error:  # refused, no route, no such name; not a matter of time
            raise KdsUnreachable(url, f"no connection: {error}") from None
        except exceptions.TimeoutError:
            raise _timeout(url, timeout_s) from None
        except exceptions.HTTPError as error:
            raise KdsUnreachable(url, f"no answer: {error}") from None
        headers = {name.lower(): value for name, value in response.headers.items()}
        return HttpAnswer(status=response.status, headers=headers, body=body)

    def _body(
        self, url: str, response: BaseHTTPResponse, deadline: float, timeout_s: float, limit: int
    ) -> bytes:
        """All of it, in time: a service that sends byte by byte must not hold us for ever."""
        parts, size = [], 0
        while part := _part(url, response):
            parts.append(part)
            size += len(part)
            if size > limit:
                response.close()
                raise KdsContentError(url, f"answer: got more than {limit} bytes")
            if self._monotonic() > deadline:
                response.close()
                raise _timeout(url, timeout_s)
        return b"".join(parts)

    def _pool_for(self, url: str) -> PoolManager:
        proxy = _proxy_for(url)
        if proxy not in self._pools:
            self._pools[proxy] = _new_pool(proxy, self._ca_file)
        return self._pools[proxy]


def _part(url: str, response: BaseHTTPResponse) -> bytes:
    from urllib3 import exceptions

    try:
        return response.read1(_CHUNK)
    except exceptions.ProtocolError as error:
        raise KdsTruncated(url, f"the connection ended inside the answer: {error}") from None


def _timeout(url: str, timeout_s: float) -> KdsTimeout:
    return KdsTimeout(url, f"no whole answer within {timeout_s:g} s")


def _proxy_for(url: str) -> str | None:
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    proxy = getproxies().get(parts.scheme)
    return None if proxy is None or proxy_bypass(parts.netloc) else proxy


def _new_pool(proxy: str | None, ca_file: Path | None) -> PoolManager:
    try:
        import urllib3
    except ImportError:
        raise HostError("urllib3 is not installed; remedy: pip install 'swsnp[kds]'") from None
    options: dict[str, Any] = {} if ca_file is None else {"ca_certs": str(ca_file)}
    try:
        return urllib3.PoolManager(**options) if proxy is None else urllib3.ProxyManager(proxy, **options)
    except (urllib3.exceptions.HTTPError, ValueError) as error:
        raise HostError(f"proxy {proxy!r} of the environment cannot be used: {error}") from None
