"""One emulated hierarchy per product line and run, with a chip; RSA-4096 keys are the dearest thing here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca.manufacture import Hierarchy
from swsnp.crypto import ecdsa
from swsnp.crypto.derive import SeededEntropy
from swsnp.testing import FakeClock

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2024, 5, 5, 1, 2, 3, tzinfo=UTC)
SEED = b"test hierarchy 41"
"""Its prime searches happen to be short."""


class Clock(FakeClock):
    """A clock that only `sleep` moves; what stands first in `at_sleep` runs at every sleep."""

    def __init__(self) -> None:
        super().__init__(1000.0)
        self.at_sleep: list[Callable[[], None]] = []

    def sleep(self, seconds: float, /) -> None:
        super().sleep(seconds)
        if self.at_sleep:
            self.at_sleep.pop(0)()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@dataclass(frozen=True)
class Authority:
    """A hierarchy and one chip below it."""

    hierarchy: Hierarchy
    tcb: TcbVersion
    hwid: bytes

    @property
    def product(self) -> Product:
        return self.hierarchy.product

    @cached_property
    def key(self) -> ecdsa.SigningKey:
        return ecdsa.SigningKey.from_scalar(0x1234567, deterministic=True)

    @cached_property
    def vcek(self) -> bytes:
        return self.hierarchy.vcek(*self.key.public_point, self.hwid, self.tcb)

    @cached_property
    def vlek(self) -> bytes:
        return self.hierarchy.vlek(*self.key.public_point, "CN=provider.example", self.tcb)

    @cached_property
    def crl(self) -> bytes:
        return self.hierarchy.crl()


@pytest.fixture(scope="session")
def authority_of() -> Callable[[Product], Authority]:
    """The run's hierarchy of a product line, made when first asked for."""
    made: dict[Product, Authority] = {}

    def of(product: Product) -> Authority:
        if product not in made:
            made[product] = Authority(
                hierarchy=Hierarchy(product, entropy=SeededEntropy(SEED), now=lambda: NOW),
                tcb=TcbVersion.encode(product, boot_loader=4, snp=0x18, microcode=0xDB),
                hwid=bytes(range(1, product.hwid_size + 1)),
            )
        return made[product]

    return of


@pytest.fixture(scope="session")
def milan(authority_of: Callable[[Product], Authority]) -> Authority:
    """A Milan chip."""
    return authority_of(Product.MILAN)


@pytest.fixture(scope="session")
def turin(authority_of: Callable[[Product], Authority]) -> Authority:
    """A Turin chip."""
    return authority_of(Product.TURIN)
