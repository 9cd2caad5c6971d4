"""SNP_DOWNLOAD_FIRMWARE_EX: other firmware from now on. Source: AMD 56860, command CAh.

The image is this project's own: a header that names a version and a TCB, since there is no code to run. A
real image, or anything else, has no signature that this chip knows: BAD_SIGNATURE.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from swsnp.abi.record import Record, blob, mbz, record, u8, u16, u32, u64
from swsnp.abi.snp_command import DownloadFirmwareEx, FirmwareStatus
from swsnp.abi.snp_report import TcbVersion
from swsnp.errors import UsageError
from swsnp.firmware.faults import FirmwareFault, require
from swsnp.firmware.settings import ApiVersion

if TYPE_CHECKING:
    from swsnp.firmware.chip import PlatformVariables
    from swsnp.firmware.platform import Platform

__all__ = ["FirmwareImage", "download_firmware_ex", "image"]

_MAGIC: Final = b"swsnp-fw"
_FORM: Final = 1
_ALIGNMENT: Final = 32
_COMMIT: Final = 1


@record(size=0x20, source="swsnp, firmware image")
class FirmwareImage(Record):
    """What stands for a firmware image."""

    magic: bytes = blob(0x00, 8)
    form: int = u16(0x08)
    api_major: int = u8(0x0A)
    api_minor: int = u8(0x0B)
    build: int = u32(0x0C)
    tcb: TcbVersion = u64(0x10, TcbVersion)
    reserved_18: bytes = mbz(0x18, 8)


def image(*, version: ApiVersion, tcb: TcbVersion) -> bytes:
    """An image of a firmware version that runs under a TCB, 32 bytes."""
    return bytes(
        FirmwareImage(
            magic=_MAGIC,
            form=_FORM,
            api_major=version.major,
            api_minor=version.minor,
            build=version.build,
            tcb=tcb,
        )
    )


def download_firmware_ex(platform: Platform, buffer: DownloadFirmwareEx) -> None:
    """SNP_DOWNLOAD_FIRMWARE_EX, in any state: legacy SEV is never initialised here.

    1. Reserved bits: INVALID_PARAM; LEN is not looked at.
    2. FW_PADDR not 32-byte aligned, or no memory there: INVALID_ADDRESS.
    3. No image: BAD_SIGNATURE. An image of another form, or a TCB not of the product's form: BAD_VERSION.
    4. Version or a TCB component below the committed one: UPDATE_FAILED.
    """
    require(not (buffer.reserved_04 or buffer.flags & ~_COMMIT), FirmwareStatus.INVALID_PARAM)
    require(not buffer.fw_paddr % _ALIGNMENT, FirmwareStatus.INVALID_ADDRESS)
    found = _image(platform, buffer)
    require(found.magic == _MAGIC, FirmwareStatus.BAD_SIGNATURE)
    chip = platform.chip
    known = found.form == _FORM and not any(found.tcb.reserved(chip.product))
    require(known, FirmwareStatus.BAD_VERSION)
    version = ApiVersion(major=found.api_major, minor=found.api_minor, build=found.build)
    require(not _below_committed(version, chip.variables), FirmwareStatus.UPDATE_FAILED)
    try:
        chip.update(current_tcb=found.tcb, current_version=version)
    except UsageError:
        raise FirmwareFault(FirmwareStatus.UPDATE_FAILED) from None
    if buffer.flags & _COMMIT:
        chip.commit()


def _image(platform: Platform, buffer: DownloadFirmwareEx) -> FirmwareImage:
    """What lies at FW_PADDR; raises BusError, which the mailbox answers with INVALID_ADDRESS."""
    raw = platform.memory.read(buffer.fw_paddr, min(buffer.fw_len, FirmwareImage.SIZE))
    return FirmwareImage.parse(raw.ljust(FirmwareImage.SIZE, b"\0"))


def _below_committed(version: ApiVersion, variables: PlatformVariables) -> bool:
    committed = variables.committed_version
    return (version.major, version.minor, version.build) < (committed.major, committed.minor, committed.build)
