"""PAGE_TYPE and the packed form of PAGE_INFO, which a launch digest is made of.

`swsnp measure` is done in milliseconds, most of them Python's own start, so this module loads neither
`typing` nor a record; a test holds it against `abi.snp_launch.PageInfo`.

Source: AMD 56860, SNP_LAUNCH_UPDATE and PAGE_INFO.
"""

from __future__ import annotations

import struct
from enum import IntEnum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final

__all__ = ["GUEST_TSC_FIELDS", "PAGE", "PAGE_INFO_SIZE", "PAGE_INFO_TAIL", "PageType", "VMSA_GPA"]

PAGE: Final = 4096
PAGE_INFO_SIZE: Final = 0x70
PAGE_INFO_TAIL: Final = struct.Struct("<HBBxBBB")
"""LENGTH, PAGE_TYPE, IMI_PAGE, VMPL1_PERMS, VMPL2_PERMS, VMPL3_PERMS: from 60h to GPA."""
VMSA_GPA: Final = 0xFFFF_FFFF_F000
"""GPA under which KVM measures every VMSA page."""
GUEST_TSC_FIELDS: Final = slice(0x2F0, 0x300)
"""GUEST_TSC_SCALE and GUEST_TSC_OFFSET, taken as zero when a VMSA page is measured."""


class PageType(IntEnum):
    """PAGE_TYPE of SNP_LAUNCH_UPDATE."""

    NORMAL = 1
    VMSA = 2
    ZERO = 3
    UNMEASURED = 4
    SECRETS = 5
    CPUID = 6
