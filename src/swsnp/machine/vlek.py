"""A provider's signing key on one host: the key as a chip loads it, its certificate, its table."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from swsnp.abi.ghcb import PAGE
from swsnp.abi.psp_sev import SEV_ISSUE_CMD, SevIssueCmd, SevUserCommand
from swsnp.abi.snp_command import VlekLoad

if TYPE_CHECKING:
    from swsnp.abi.snp_report import TcbVersion
    from swsnp.firmware.keys import VlekKey
    from swsnp.hypervisor.task import HostTask

__all__ = ["Vlek", "load_hashstick"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Vlek:
    """What `Machine.vlek` gives. Good for one TCB; after a change of the reported TCB, ask for another.

    Attributes:
        csp_id: the provider, as its certificate names it.
        key: what the chip loads. A chip holds one VLEK at a time.
        certificate: DER.
        table: VLEK, ASVK and ARK, as guests get it.
    """

    csp_id: str
    key: VlekKey = field(repr=False)
    certificate: bytes = field(repr=False)
    table: bytes = field(repr=False)

    @property
    def tcb(self) -> TcbVersion:
        """The TCB that the key was issued for."""
        return self.key.tcb


def load_hashstick(operator: HostTask, stick: bytes) -> tuple[int, int]:
    """SNP_VLEK_LOAD through /dev/sev, as an operator's tool does it; the process ends with it.

    Args:
        operator: a process of its own.
        stick: 432 bytes; `firmware.vlek.wrap` makes one.

    Returns:
        The ioctl's result, 0 or -errno, and the firmware's status.
    """
    try:
        page = operator.allocate(PAGE)
        load = VlekLoad(length=VlekLoad.SIZE, vlek_wrapped_paddr=page + VlekLoad.SIZE)
        operator.write(page, bytes(load) + stick)
        command = bytearray(bytes(SevIssueCmd(cmd=SevUserCommand.SNP_VLEK_LOAD, data=page)))
        result = operator.ioctl(operator.open("/dev/sev"), SEV_ISSUE_CMD, command)
        return result, SevIssueCmd.parse(command).error
    finally:
        operator.exit()
