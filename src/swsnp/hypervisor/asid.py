"""Address space identifiers of SNP guests. Source: Linux, arch/x86/kvm/svm/sev.c."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from swsnp.abi.snp_command import Command

if TYPE_CHECKING:
    from swsnp.hypervisor.psp_driver import PspDriver

__all__ = ["AsidPool"]


class AsidPool:
    """ASIDs 1 to `max_asid`. One that a guest had is used again only after a data fabric flush."""

    def __init__(self, max_asid: int, driver: PspDriver) -> None:
        self._driver = driver
        self._lock = threading.Lock()
        self._max = max_asid
        self._free = set(range(1, max_asid + 1))
        self._stale: set[int] = set()

    def take(self) -> int:
        """The lowest clean ASID; -ENOTTY when the host has none at all, -EBUSY when all are taken."""
        with self._lock:
            if self._max < 1:
                return -errno.ENOTTY
            if not self._free:
                self._flush()
            if not self._free:
                return -errno.EBUSY
            asid = min(self._free)
            self._free.remove(asid)
            return asid

    def give_back(self, asid: int) -> None:
        """A guest's end: the ASID waits for the next flush."""
        with self._lock:
            self._stale.add(asid)

    def _flush(self) -> None:
        if self._stale and self._driver.issue(Command.SNP_DF_FLUSH).ret == 0:
            self._free, self._stale = self._stale, set()
