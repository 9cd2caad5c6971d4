"""`/dev/sev`: the host's view of the firmware. Source: Linux, include/uapi/linux/psp-sev.h."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from swsnp.abi.record import Record, record, u32, u64

__all__ = ["NO_FW_CALL", "SevIssueCmd", "SevUserCommand", "SevUserDataGetId2", "SEV_ISSUE_CMD"]

NO_FW_CALL: Final = 0xFFFFFFFF
"""SEV_RET_NO_FW_CALL (-1): the driver's own value, never a firmware status."""
SEV_ISSUE_CMD: Final = 0xC0105300


class SevUserCommand(IntEnum):
    """`cmd` of SEV_ISSUE_CMD; the legacy SEV commands 0..7 are not listed."""

    SEV_GET_ID2 = 8
    SNP_PLATFORM_STATUS = 9
    SNP_COMMIT = 10
    SNP_SET_CONFIG = 11
    SNP_VLEK_LOAD = 12


@record(size=16, source="Linux, struct sev_issue_cmd")
class SevIssueCmd(Record):
    """The argument of SEV_ISSUE_CMD (packed)."""

    cmd: int = u32(0)
    data: int = u64(4)
    error: int = u32(12)


@record(size=12, source="Linux, struct sev_user_data_get_id2")
class SevUserDataGetId2(Record):
    """SEV_GET_ID2 (packed)."""

    address: int = u64(0)
    length: int = u32(8)
