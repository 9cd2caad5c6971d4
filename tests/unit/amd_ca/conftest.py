"""One hierarchy per product line and run; RSA-4096 keys are the dearest thing in these tests."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product
from swsnp.amd_ca.manufacture import Hierarchy
from swsnp.crypto.derive import SeededEntropy

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = datetime(2024, 5, 5, 1, 2, 3, 456789, tzinfo=UTC)
# seeds whose prime searches happen to be short
SEEDS = {
    Product.MILAN: b"test hierarchy 41",
    Product.GENOA: b"test hierarchy 41",
    Product.TURIN: b"test hierarchy 41",
}


@pytest.fixture(scope="session")
def hierarchy_of() -> Callable[[Product], Hierarchy]:
    """The run's hierarchy of a product line, made when first asked for."""
    made: dict[Product, Hierarchy] = {}

    def of(product: Product) -> Hierarchy:
        if product not in made:
            made[product] = Hierarchy(product, entropy=SeededEntropy(SEEDS[product]), now=lambda: NOW)
        return made[product]

    return of
