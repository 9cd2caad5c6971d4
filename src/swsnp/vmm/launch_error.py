"""What went wrong in a launch, in the words of the kernel and the firmware, and what to look at."""

from __future__ import annotations

import errno
from typing import Final

from swsnp.abi.snp_command import FirmwareStatus
from swsnp.errors import HostError
from swsnp.vmm.host import errno_name

__all__ = ["LaunchError"]

_HINTS: Final[dict[tuple[str, int], str]] = {
    ("KVM_CREATE_VM", errno.EINVAL): "KVM does not offer SNP virtual machines",
    ("SEV_INIT2", errno.EINVAL): "vmsa_features that KVM does not accept, or vCPUs exist already",
    ("SEV_INIT2", errno.EBUSY): "all SNP address space identifiers are in use",
    ("SEV_INIT2", errno.ENOTTY): "SEV-SNP is off on this host",
    ("SNP_LAUNCH_START", errno.EINVAL): "policy bits that KVM or the firmware do not accept",
    ("SNP_LAUNCH_START", errno.ENOTTY): "no guest context: the firmware is not initialised",
    ("SNP_LAUNCH_START", errno.EBADF): "the descriptor of the SEV device is not open",
    ("SNP_LAUNCH_UPDATE", errno.EIO): "the page is not private or in use, or the firmware refused it",
    ("SNP_LAUNCH_FINISH", errno.EINVAL): "id-block without id-auth, or finished already",
    ("SNP_LAUNCH_FINISH", errno.EIO): "the firmware refused: see its status",
}
_STATUS_HINTS: Final[dict[int, str]] = {
    FirmwareStatus.POLICY_FAILURE: "the chip does not allow this policy, or it differs from the ID block's",
    FirmwareStatus.BAD_MEASUREMENT: "the launch digest in the ID block is not that of this image",
    FirmwareStatus.BAD_SIGNATURE: "a signature in id-auth does not fit the ID block or the ID key",
    FirmwareStatus.INVALID_PARAM: "a reserved field is set, or the CPUID page promises what the chip lacks",
}


class LaunchError(HostError):
    """A step of the launch failed.

    Attributes:
        command: the step, by the name of its command or ioctl.
        errno: positive, 0 where the kernel gave none.
        firmware_status: what the firmware said, 0 where it was not asked.
        corrected: the CPUID page as the firmware would take it, if it gave one.
    """

    def __init__(
        self,
        command: str,
        result: int,
        firmware_status: int = 0,
        *,
        detail: str = "",
        corrected: bytes | None = None,
    ) -> None:
        self.command, self.errno, self.firmware_status = command, -result, firmware_status
        self.corrected = corrected
        parts = [command if result == 0 else f"{command}: {errno_name(result)}"]
        if firmware_status:
            parts.append(f"firmware status {_status_name(firmware_status)}")
        hint = detail or _STATUS_HINTS.get(firmware_status) or _HINTS.get((command, -result))
        super().__init__("; ".join([*parts, hint] if hint else parts))


def _status_name(status: int) -> str:
    try:
        return f"{FirmwareStatus(status).name} ({status:#04x})"
    except ValueError:
        return f"{status:#04x}"
