"""A chip and its TCB as people write them: in options, in fleet files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import TcbVersion
from swsnp.errors import UsageError

if TYPE_CHECKING:
    from swsnp.abi.snp_report import Product

__all__ = ["read_hwid", "read_tcb"]

_LEVELS: Final = {
    "bl": "boot_loader", "blspl": "boot_loader", "boot_loader": "boot_loader", "bootloader": "boot_loader",
    "tee": "tee", "teespl": "tee",
    "snp": "snp", "snpspl": "snp",
    "ucode": "microcode", "ucodespl": "microcode", "microcode": "microcode",
    "fmc": "fmc", "fmcspl": "fmc",
}  # fmt: skip
"""Names of patch levels as people write them, in lower case: the report's, the key service's, short ones."""


def read_hwid(text: str, product: Product) -> bytes:
    """A chip id in hexadecimal: 64 bytes; for Turin 8, or 64 of which the last 56 are zero.

    Raises:
        UsageError: anything else.
    """
    try:
        raw = bytes.fromhex(text)
    except ValueError:
        raise UsageError(f"chip id: got {text!r}, wanted hexadecimal digits") from None
    size = product.hwid_size
    if len(raw) not in (size, 64) or any(raw[size:]):
        raise UsageError(f"chip id: got {len(raw)} bytes, wanted {size} for {product.value}")
    return raw[:size]


def read_tcb(text: str, product: Product) -> TcbVersion:
    """A TCB from "bl=4,tee=0,snp=24,ucode=219": every level of the product, once.

    Raises:
        UsageError: a level is missing, unknown, twice, or no number of 0 to 255.
    """
    wanted = TcbVersion.byte_order(product)
    found: dict[str, int] = {}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        level = _LEVELS.get(name.strip().lower())
        if level not in wanted or level in found:
            raise UsageError(f"TCB: got {pair!r}, wanted each of {_names(product)} once for {product.value}")
        if not (value.strip().isascii() and value.strip().isdecimal()) or int(value) > 255:
            raise UsageError(f"TCB, {name}: got {value!r}, wanted 0 to 255 in decimal")
        found[level] = int(value)
    if len(found) != len(wanted):
        raise UsageError(f"TCB: got {text!r}, wanted each of {_names(product)} for {product.value}")
    return TcbVersion.encode(product, **found)


def _names(product: Product) -> str:
    return ", ".join(
        next(n for n, each in _LEVELS.items() if each == name) for name in TcbVersion.byte_order(product)
    )
