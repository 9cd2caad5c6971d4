"""Chips of every product line, a key service for them, and a client of it whose time belongs to the test."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product
from swsnp.amd_ca.kds_double import KdsDouble
from swsnp.amd_ca.kds_server import KdsServer
from swsnp.certs.kds_cache import MemoryCache
from swsnp.certs.kds_client import KdsClient
from swsnp.certs.kds_transport import HttpAnswer
from swsnp.certs.kds_url import VcekRequest
from swsnp.machine import Machine
from swsnp.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.certs.kds_cache import Cache

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class Direct:
    """A transport without sockets: the double's replies, as they are; counts."""

    def __init__(self, double: KdsDouble, base: str) -> None:
        self.double = double
        self.base = base
        self.timeouts: list[float] = []

    def get(self, url: str, *, timeout_s: float, limit: int) -> HttpAnswer:
        del limit
        self.timeouts.append(timeout_s)
        reply = self.double.answer(url.removeprefix(self.base))
        headers = {name.lower(): value for name, value in reply.headers}
        return HttpAnswer(status=reply.status, headers=headers, body=reply.body)


class Bench:
    """A client over `Direct`, and what it did."""

    base = "http://double"

    def __init__(self, double: KdsDouble, machines: dict[Product, Machine]) -> None:
        self.double = double
        self.machines = machines
        self.clock = FakeClock()
        self.now = NOW
        self.transport = Direct(double, self.base)
        self.cache: Cache = MemoryCache()

    def client(self, **options: object) -> KdsClient:
        fixed = {
            "base": self.base,
            "transport": self.transport,
            "now": lambda: self.now,
            "monotonic": self.clock.monotonic,
            "sleep": self.clock.sleep,
        }
        cache = options.pop("cache", self.cache)
        return KdsClient(cache, **{**fixed, **options})  # type: ignore[arg-type]  # passed on as it came

    def vcek_request(self, product: Product = Product.MILAN) -> VcekRequest:
        machine = self.machines[product]
        return VcekRequest(product=product, hwid=machine.hwid, tcb=machine.chip.reported_tcb)

    @property
    def statuses(self) -> list[int]:
        return [each.status for each in self.double.asked]


@pytest.fixture(scope="session")
def machines() -> dict[Product, Machine]:
    """One of each; their RSA keys are made once for all tests."""
    return {product: Machine(product=product, now=lambda: NOW) for product in Product}


@pytest.fixture
def double(machines: dict[Product, Machine]) -> KdsDouble:
    return KdsDouble(machines.values(), now=lambda: NOW)


@pytest.fixture
def bench(double: KdsDouble, machines: dict[Product, Machine]) -> Bench:
    return Bench(double, machines)


@pytest.fixture
def server(double: KdsDouble) -> Iterator[KdsServer]:
    with KdsServer(double, control=True) as listening:
        yield listening


@pytest.fixture
def connected(server: KdsServer) -> Callable[..., KdsClient]:
    """A client of `server` over a real socket, quick to give up."""

    def connect(**options: object) -> KdsClient:
        cache = options.pop("cache", None) or MemoryCache()
        fixed = {"base": server.url, "budget_s": 0.0, "attempt_s": 10.0, "now": lambda: NOW}
        return KdsClient(cache, **{**fixed, **options})  # type: ignore[arg-type]  # passed on as it came

    return connect
