"""URLs of the key service: a request that reads back from its own URL, or LayoutError, nothing else."""

from __future__ import annotations

from functools import partial

from fuzz.outcome import attempt
from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.certs.kds_url import (
    ChainRequest,
    CrlRequest,
    KdsRequest,
    VcekRequest,
    VlekRequest,
    parse_target,
    parse_url,
    target_of,
    url_of,
)
from swsnp.errors import LayoutError, UsageError

__all__ = ["one", "seeds"]


def seeds() -> list[bytes]:
    """One of each, as paths, and a whole URL."""
    requests: list[KdsRequest] = [
        VcekRequest(product=product, hwid=bytes(product.hwid_size), tcb=TcbVersion(0)) for product in Product
    ]
    others: tuple[KdsRequest, ...] = (
        VlekRequest(product=Product.MILAN, tcb=TcbVersion(0)),
        ChainRequest(product=Product.GENOA),
        CrlRequest(product=Product.TURIN, kind="vlek"),
    )
    return [*(target_of(each).encode() for each in (*requests, *others)), url_of(others[1]).encode()]


def one(data: bytes) -> object:
    """As a path, and as a URL: only there can the service's address be at fault."""
    text = data.decode("latin-1")
    request, refusal = attempt(partial(parse_target, text), LayoutError)
    if request is not None:
        assert parse_target(target_of(request)) == request
        assert parse_url(url_of(request)) == ("https://kdsintf.amd.com", request)
    whole, other = attempt(partial(parse_url, text), LayoutError, UsageError)
    if whole is not None:
        base, request = whole
        assert parse_url(url_of(request, base)) == whole
    return type(request).__name__, refusal, other
