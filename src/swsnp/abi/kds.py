"""Certificates of the key service: names, object identifiers, profiles. Source: AMD 57230."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product

__all__ = [
    "AMD_ORGANIZATION",
    "EXTENSION_ROOT",
    "OID_CSP_ID",
    "OID_HWID",
    "OID_PRODUCT_NAME",
    "OID_STRUCT_VERSION",
    "SPL_OIDS",
]

EXTENSION_ROOT: Final = "1.3.6.1.4.1.3704.1"
OID_STRUCT_VERSION: Final = f"{EXTENSION_ROOT}.1"
OID_PRODUCT_NAME: Final = f"{EXTENSION_ROOT}.2"
OID_HWID: Final = f"{EXTENSION_ROOT}.4"
OID_CSP_ID: Final = f"{EXTENSION_ROOT}.5"
SPL_OIDS: Final = {
    "boot_loader": f"{EXTENSION_ROOT}.3.1",
    "tee": f"{EXTENSION_ROOT}.3.2",
    "snp": f"{EXTENSION_ROOT}.3.3",
    "microcode": f"{EXTENSION_ROOT}.3.8",
    "fmc": f"{EXTENSION_ROOT}.3.9",
}
"""TCB component to the extension that carries its security patch level."""
SPL_RESERVED_OIDS: Final = {n: f"{EXTENSION_ROOT}.3.{n}" for n in (4, 5, 6, 7)}
AMD_ORGANIZATION: Final = "Advanced Micro Devices"
LEAF_NAMES: Final = {"vcek": "SEV-VCEK", "vlek": "SEV-VLEK"}


def ark_name(product: Product) -> str:
    """Common name of the root."""
    return f"ARK-{product.value}"


def ask_name(product: Product) -> str:
    """Common name of the intermediate that signs VCEKs."""
    return f"SEV-{product.value}"


def asvk_name(product: Product) -> str:
    """Common name of the intermediate that signs VLEKs."""
    return f"SEV-VLEK-{product.value}"
