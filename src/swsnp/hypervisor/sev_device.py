"""/dev/sev: what operators and VMMs ask the firmware's driver.

Source: Linux, drivers/crypto/ccp/sev-dev.c and include/uapi/linux/psp-sev.h.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand, SevUserDataGetId2
from swsnp.abi.snp_command import (
    Command,
    Commit,
    Config,
    GetId,
    VlekHashstick,
    VlekLoad,
)
from swsnp.hardware.memory import PAGE, BusError
from swsnp.hypervisor.psp_driver import DriverResult, SevFile

if TYPE_CHECKING:
    from swsnp.hardware.memory import SystemMemory
    from swsnp.hypervisor.psp_driver import PspDriver
    from swsnp.hypervisor.task import HostTask

__all__ = ["SevDevice"]

_EFAULT: Final = DriverResult(-errno.EFAULT, 0)
_EINVAL: Final = DriverResult(-errno.EINVAL, 0)


class SevDevice(SevFile):
    """One open file of /dev/sev. Opened for reading and writing by a process that may change the settings."""

    def __init__(self, task: HostTask, driver: PspDriver, memory: SystemMemory) -> None:
        self._task = task
        self._driver = driver
        self._memory = memory
        self._commands = {
            SevUserCommand.SEV_GET_ID2: self._get_id2,
            SevUserCommand.SNP_PLATFORM_STATUS: self._platform_status,
            SevUserCommand.SNP_COMMIT: self._commit,
            SevUserCommand.SNP_SET_CONFIG: self._set_config,
            SevUserCommand.SNP_VLEK_LOAD: self._vlek_load,
        }

    def ioctl(self, request: int, arg: int | bytearray | memoryview) -> int:
        """SEV_ISSUE_CMD with a `SevIssueCmd`; `error` is written back also when the command failed."""
        if not self._driver.present:
            return -errno.ENODEV
        if request != SEV_ISSUE_CMD:
            return -errno.EINVAL
        if isinstance(arg, int) or len(arg) != SevIssueCmd.SIZE:
            return -errno.EFAULT
        wanted = SevIssueCmd.parse(arg)
        run = self._commands.get(wanted.cmd)  # type: ignore[call-overload]  # any int may be asked for
        if run is None:
            return -errno.EINVAL
        result = run(wanted.data)
        arg[:] = bytes(wanted.but(error=result.fw))
        return int(result.ret)

    def release(self) -> None:
        """Close: nothing to give back."""

    def _platform_status(self, data: int) -> DriverResult:
        if not data:
            return _EINVAL
        result, status = self._driver.platform_status()
        if result.ret == 0 and not self._put(data, bytes(status)):
            return _EFAULT
        return result

    def _commit(self, _data: int) -> DriverResult:
        if not self._driver.initialised:
            return _EINVAL
        return self._driver.issue(Command.SNP_COMMIT, bytes(Commit(length=Commit.SIZE)))

    def _set_config(self, data: int) -> DriverResult:
        if not data or not self._driver.initialised:
            return _EINVAL
        config = self._get(data, Config.SIZE)
        return _EFAULT if config is None else self._driver.issue(Command.SNP_CONFIG, config)

    def _vlek_load(self, data: int) -> DriverResult:
        if not data or not self._driver.initialised:
            return _EINVAL
        raw = self._get(data, VlekLoad.SIZE)
        if raw is None:
            return _EFAULT
        wanted = VlekLoad.parse(raw)
        if wanted.length != VlekLoad.SIZE or wanted.vlek_wrapped_version != 0:
            return _EINVAL
        wrapped = self._get(wanted.vlek_wrapped_paddr, VlekHashstick.SIZE)
        if wrapped is None:
            return _EFAULT
        page = self._memory.allocate_page()
        self._memory.write(page, wrapped)
        result = self._driver.issue(Command.SNP_VLEK_LOAD, bytes(wanted.but(vlek_wrapped_paddr=page)))
        self._driver.free_page(page)
        return result

    def _get_id2(self, data: int) -> DriverResult:
        raw = self._get(data, SevUserDataGetId2.SIZE)
        if raw is None:
            return _EFAULT
        wanted = SevUserDataGetId2.parse(raw)
        if wanted.length > PAGE:
            return DriverResult(-errno.ENOMEM, 0)
        page = self._memory.allocate_page() if wanted.address and wanted.length else 0
        command = GetId(id_paddr=page, length=wanted.length if page else 0)
        result, answered = self._driver.issue_answered(Command.GET_ID, bytes(command), page)
        length = GetId.parse(answered).length
        found = self._memory.read(page, min(length, PAGE)) if page else b""
        if page:
            self._driver.free_page(page)
        if not self._put(data, bytes(wanted.but(length=length))):
            return _EFAULT
        if result.ret == 0 and not self._put(wanted.address, found):
            return _EFAULT
        return result

    def _get(self, address: int, size: int) -> bytes | None:
        try:
            return self._task.read(address, size)
        except BusError:
            return None

    def _put(self, address: int, data: bytes) -> bool:
        try:
            self._task.write(address, data)
        except BusError:
            return False
        return True
