"""Evidence to begin with: a hierarchy, leaves, lists and a report, made once for all harnesses."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache

from swsnp.abi.snp_report import (
    SIGNED_SIZE,
    AttestationReport,
    GuestPolicy,
    PlatformInfo,
    Product,
    TcbVersion,
)
from swsnp.amd_ca.manufacture import Hierarchy
from swsnp.crypto.derive import SeededEntropy
from swsnp.crypto.ecdsa import SigningKey

__all__ = ["NOW", "Evidence", "evidence"]

NOW = datetime(2026, 1, 2, tzinfo=UTC)


@dataclass(frozen=True)
class Evidence:
    """What verifies, of one chip; certificates in DER."""

    hierarchy: Hierarchy
    report: bytes
    vcek: bytes
    table: bytes
    crl: bytes


@lru_cache(maxsize=1)
def evidence() -> Evidence:
    """A Milan chip's. The seed is one whose RSA keys are found quickly."""
    made = datetime(2026, 1, 1, tzinfo=UTC)
    hierarchy = Hierarchy(Product.MILAN, entropy=SeededEntropy(b"test hierarchy 41"), now=lambda: made)
    key = SigningKey.from_scalar(0x1234567, deterministic=True)
    tcb = TcbVersion.encode(Product.MILAN, boot_loader=4, snp=0x18, microcode=0xDB)
    chip_id = bytes(range(1, 65))
    vcek = hierarchy.vcek(*key.public_point, chip_id, tcb)
    body = bytes(
        AttestationReport(
            version=3,
            policy=GuestPolicy(0x30000),
            signature_algo=1,
            current_tcb=tcb,
            committed_tcb=tcb,
            reported_tcb=tcb,
            launch_tcb=tcb,
            platform_info=PlatformInfo(0x25),
            report_id_ma=b"\xff" * 32,
            cpuid_fam_id=0x19,
            cpuid_mod_id=1,
            chip_id=chip_id,
            current_build=5,
            committed_build=5,
        )
    )[:SIGNED_SIZE]
    report = body + key.sign(body).ljust(0x200, b"\0")
    return Evidence(hierarchy, report, vcek, hierarchy.table(vcek=vcek), hierarchy.crl())
