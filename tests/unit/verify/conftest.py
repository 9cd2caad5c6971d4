"""Evidence that verifies, to be spoiled one property at a time."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pytest

from swsnp.abi.snp_report import (
    SIGNED_SIZE,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
    SignerInfo,
    SigningKey,
    TcbVersion,
)
from swsnp.amd_ca.manufacture import Hierarchy
from swsnp.crypto import ecdsa
from swsnp.crypto.derive import SeededEntropy
from swsnp.verify.roots import Roots

NOW = datetime(2024, 5, 5, 1, 2, 3, tzinfo=UTC)
# seeds whose prime searches happen to be short
SEEDS = {Product.MILAN: b"test hierarchy 41", Product.TURIN: b"test hierarchy 41"}
FAMILY_MODEL = {Product.MILAN: (0x19, 0x01), Product.TURIN: (0x1A, 0x02)}


@dataclass
class Bench:
    """One product line: its hierarchy, a chip's key, and reports that it signs."""

    product: Product
    hierarchy: Hierarchy
    key: ecdsa.SigningKey
    tcb: TcbVersion
    vcek: bytes
    chip_id: bytes

    @property
    def certificates(self) -> list[bytes]:
        return [self.vcek, self.hierarchy.ask, self.hierarchy.ark]

    @property
    def roots(self) -> Roots:
        return Roots.of(self.hierarchy.ark)

    @property
    def at(self) -> datetime:
        return NOW

    def report(self, **changes: Any) -> bytes:
        """A signed report of version 3 that passes every check, with some fields changed before signing."""
        family, model = FAMILY_MODEL[self.product]
        fields: dict[str, Any] = {
            "version": 3,
            "policy": GuestPolicy(0x30000),
            "signature_algo": 1,
            "current_tcb": self.tcb,
            "committed_tcb": self.tcb,
            "reported_tcb": self.tcb,
            "launch_tcb": self.tcb,
            "platform_info": PlatformInfo(0x25),
            "report_data": b"\x11" * 64,
            "measurement": b"\x22" * 48,
            "report_id_ma": b"\xff" * 32,
            "cpuid_fam_id": family,
            "cpuid_mod_id": model,
            "chip_id": self.chip_id,
            "current_build": 5,
            "committed_build": 5,
        }
        return self.sign(AttestationReport(**{**fields, **changes}))

    def vlek_report(self, **changes: Any) -> bytes:
        """The same, for a signature by the VLEK."""
        return self.report(signer_info=SignerInfo.of(signing_key=SigningKey.VLEK), **changes)

    def sign(self, report: AttestationReport) -> bytes:
        body = bytes(report)[:SIGNED_SIZE]
        return body + self.key.sign(body).ljust(0x200, b"\x00")


def _bench(product: Product) -> Bench:
    hierarchy = Hierarchy(product, entropy=SeededEntropy(SEEDS[product]), now=lambda: NOW)
    key = ecdsa.SigningKey.from_scalar(0x1234567, deterministic=True)
    tcb = TcbVersion.encode(product, boot_loader=4, snp=0x18, microcode=0xDB)
    hwid = bytes(range(1, product.hwid_size + 1))
    vcek = hierarchy.vcek(*key.public_point, hwid, tcb)
    return Bench(product, hierarchy, key, tcb, vcek, hwid.ljust(64, b"\x00"))


@pytest.fixture(scope="session")
def milan() -> Bench:
    """A Milan chip."""
    return _bench(Product.MILAN)


@pytest.fixture(scope="session")
def turin() -> Bench:
    """A Turin chip."""
    return _bench(Product.TURIN)
