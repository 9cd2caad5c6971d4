"""guest_memfd: the file that holds a VM's private memory. Source: Linux, virt/kvm/guest_memfd.c."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from swsnp.hardware.memory import PAGE
from swsnp.hardware.rmp import RmpUpdate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swsnp.hardware.memory import SystemMemory
    from swsnp.hardware.rmp import Rmp

__all__ = ["AssignedPages", "GuestMemfd"]

_LARGE: Final = 2 << 20
_PAGES: Final = _LARGE // PAGE
_FREE, _FREE_LARGE = RmpUpdate(), RmpUpdate(page_size=1)


@dataclass(frozen=True, slots=True)
class _Binding:
    slot: int
    start: int
    end: int


class AssignedPages:
    """Page numbers of a file that the RMP may show as the guest's; 2 MiB that came at once stay one."""

    __slots__ = ("_large", "_small")

    def __init__(self) -> None:
        self._small: set[int] = set()
        self._large: set[int] = set()
        """Of each 2 MiB the first."""

    def __iter__(self) -> Iterator[int]:
        """Every page, rising."""
        inside = (page for first in self._large for page in range(first, first + _PAGES))
        return iter(sorted(self._small.union(inside)))

    def add(self, page: int) -> None:
        """One of 4 KiB."""
        self._small.add(page)

    def add_large(self, page: int) -> None:
        """One of 2 MiB, which is aligned."""
        self._large.add(page)

    def take(self, first: int, end: int) -> tuple[list[int], list[int]]:
        """Forget the pages of `first <= page < end`: the 2 MiB ones that lie in it wholly, and all others."""
        whole: list[int] = []
        if large := self._large.intersection(range(first - first % _PAGES, end, _PAGES)):
            whole = [page for page in large if first <= page and page + _PAGES <= end]
            for page in large.difference(whole):
                self._small.update(range(page, page + _PAGES))
            # only now: another vCPU that converts in these 2 MiB finds its pages in one of the sets, or both
            self._large.difference_update(large)
        if len(self._small) < end - first:
            small = [page for page in self._small if first <= page < end]
        else:
            small = [page for page in range(first, end) if page in self._small]
        self._small.difference_update(small)
        return whole, small


class GuestMemfd:
    """An open guest_memfd. `assigned` holds the page numbers that the RMP may show as the guest's."""

    def __init__(
        self,
        size: int,
        *,
        owner: object,
        memory: SystemMemory,
        rmp: Rmp,
        on_release: Callable[[GuestMemfd], None],
    ) -> None:
        """`size`: bytes, whole pages; `owner`: the VM; `on_release` is called when it is closed."""
        self.size = size
        self.owner = owner
        self.address = memory.allocate(size)
        self.view = memory.view(self.address, size)
        self.assigned: Final = AssignedPages()
        self._memory = memory
        self._rmp = rmp
        self._on_release = on_release
        self._bindings: list[_Binding] = []

    def bind(self, slot: int, offset: int, size: int) -> int:
        """Back a memslot with a range: 0, -EINVAL outside the file, -EEXIST when part of it is bound."""
        if offset % PAGE or offset + size > self.size:
            return -errno.EINVAL
        if any(each.start < offset + size and offset < each.end for each in self._bindings):
            return -errno.EEXIST
        self._bindings.append(_Binding(slot, offset, offset + size))
        return 0

    def unbind(self, slot: int) -> None:
        """Forget the range of a memslot that was deleted."""
        self._bindings = [each for each in self._bindings if each.slot != slot]

    def punch(self, offset: int, size: int) -> int:
        """fallocate(PUNCH_HOLE): 0, or -EINVAL. The pages go back to the host and read as zeros."""
        if offset < 0 or size <= 0 or offset % PAGE or size % PAGE:
            return -errno.EINVAL
        end = min(offset + size, self.size)
        if offset < end:
            self._invalidate(offset // PAGE, end // PAGE)
            self._memory.discard(self.address + offset, end - offset)
        return 0

    def ioctl(self, _request: int, _arg: object) -> int:
        """The file has no ioctl."""
        return -errno.ENOTTY

    def release(self) -> None:
        """Close: every page goes back to the host, and memslots lose their private side."""
        self._invalidate(0, self.size // PAGE)
        self._on_release(self)
        self._memory.release(self.address)

    def _invalidate(self, first: int, end: int) -> None:
        # a page that RMPUPDATE refuses (one that the firmware holds) stays as it is; Linux only warns
        large, pages = self.assigned.take(first, end)
        for page in large:
            is_one = self._rmp[self.address + page * PAGE].page_size
            pages += [page] if is_one else range(page, page + _PAGES)
        for page in pages:
            spa = self.address + page * PAGE
            entry = self._rmp[spa]
            if not entry.assigned:  # a 2 MiB page's other frames are free once its entry is
                continue
            if entry.page_size:
                if not spa % _LARGE and page + _PAGES <= end:
                    self._rmp.rmpupdate(spa, _FREE_LARGE)
                    continue
                self._rmp.psmash(spa & -_LARGE)  # the other pages stay the guest's
            self._rmp.rmpupdate(spa, _FREE)
