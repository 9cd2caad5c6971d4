"""The VLEK hashstick: how a provider's key reaches one chip. Source: AMD 56860, SNP_VLEK_LOAD.

The outer layout has the documented sizes; what is inside the wrapped part is this project's own: scalar (56
bytes, little-endian), root of derived keys (48 bytes), zeros. The wrapping key comes from the root of the
target chip for one TCB, so a stick serves that chip at that reported TCB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_command import FirmwareStatus, VlekHashstick, VlekLoad
from swsnp.crypto.aead import open_bytes, seal_bytes
from swsnp.crypto.derive import P384_ORDER, hkdf_sha384
from swsnp.crypto.seal import TagMismatch
from swsnp.errors import LayoutError
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.keys import ROOT_SIZE, VlekKey
from swsnp.hardware.memory import BusError

if TYPE_CHECKING:
    from swsnp.abi.snp_report import TcbVersion
    from swsnp.firmware.platform import Platform

__all__ = ["unwrap", "vlek_load", "wrap"]

_SALT: Final = b"swsnp/wrap/v1"
_INFO: Final = b"vlek-wrap"
_KEY_SIZE: Final = 32
_IV_SIZE: Final = 12
_SCALAR_SIZE: Final = 56
_WRAPPED_SIZE: Final = 0x180
_AAD: Final = slice(VlekHashstick.offset_of("tcb_version"), VlekHashstick.offset_of("auth_tag"))
_WRAPPED_VERSION: Final = 0


def _wrapping_key(chip_root: bytes) -> bytes:
    if len(chip_root) != ROOT_SIZE:
        raise LayoutError(f"chip root: got {len(chip_root)} bytes, wanted {ROOT_SIZE}")
    return hkdf_sha384(chip_root, salt=_SALT, info=_INFO, length=_KEY_SIZE)


def wrap(chip_root: bytes, vlek: VlekKey, iv: bytes) -> bytes:
    """Make a hashstick, 432 bytes: the provider's side of SNP_VLEK_LOAD.

    Args:
        chip_root: `keys.vcek_root` of the target chip for the VLEK's TCB, 48 bytes.
        vlek: the key to give to the chip.
        iv: 12 bytes; a fresh one for every stick.

    Raises:
        LayoutError: a root that is not 48 bytes, an IV that is not 12.
    """
    if len(iv) != _IV_SIZE:
        raise LayoutError(f"hashstick IV: got {len(iv)} bytes, wanted {_IV_SIZE} (AMD 56860, SNP_VLEK_LOAD)")
    material = vlek.scalar.to_bytes(_SCALAR_SIZE, "little") + vlek.root
    plain = VlekHashstick(iv=iv, tcb_version=vlek.tcb)
    wrapped, tag = seal_bytes(
        _wrapping_key(chip_root), iv, material.ljust(_WRAPPED_SIZE, b"\0"), bytes(plain)[_AAD]
    )
    return bytes(plain.but(wrapped=wrapped, auth_tag=tag))


def unwrap(chip_root: bytes, stick: bytes) -> VlekKey:
    """The key inside a hashstick.

    Args:
        chip_root: root of the chip that it was made for, for the TCB that it names, 48 bytes.
        stick: 432 bytes.

    Raises:
        LayoutError: another size.
        TagMismatch: made for another chip or TCB, changed since, or no key inside.
    """
    parsed = VlekHashstick.parse(stick)
    material = open_bytes(
        _wrapping_key(chip_root), parsed.iv, parsed.wrapped, parsed.auth_tag, stick[_AAD]
    )  # fmt: skip
    scalar = int.from_bytes(material[:_SCALAR_SIZE], "little")
    if not 1 <= scalar < P384_ORDER:
        raise TagMismatch("hashstick: the wrapped scalar is out of range, wanted 1..n-1 of P-384")
    root = material[_SCALAR_SIZE : _SCALAR_SIZE + ROOT_SIZE]
    return VlekKey(scalar=scalar, root=root, tcb=parsed.tcb_version)


def vlek_load(platform: Platform, buffer: VlekLoad) -> None:
    """SNP_VLEK_LOAD, in any platform state: takes the place of any VLEK before.

    1. LEN, VLEK_WRAPPED_VERSION or reserved bits: INVALID_PARAM.
    2. No memory at VLEK_WRAPPED_PADDR: INVALID_PARAM.
    3. The stick's TCB is not exactly the reported one: BAD_SVN.
    4. Authentication tag: BAD_MEASUREMENT.
    """
    well_formed = buffer.length == VlekLoad.SIZE and buffer.vlek_wrapped_version == _WRAPPED_VERSION
    require(well_formed and not any(buffer.reserved_05), FirmwareStatus.INVALID_PARAM)
    try:
        stick = platform.memory.read(buffer.vlek_wrapped_paddr, VlekHashstick.SIZE)
    except BusError:
        raise FirmwareFault(FirmwareStatus.INVALID_PARAM) from None
    tcb: TcbVersion = VlekHashstick.parse(stick).tcb_version
    chip = platform.chip
    require(tcb == chip.reported_tcb, FirmwareStatus.BAD_SVN)
    try:
        vlek = unwrap(chip.vcek_root(tcb), stick)
    except TagMismatch:
        raise FirmwareFault(FirmwareStatus.BAD_MEASUREMENT) from None
    chip.load_vlek(vlek)
