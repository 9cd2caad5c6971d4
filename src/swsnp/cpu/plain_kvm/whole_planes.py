"""Guest memory for a whole kernel: slots of the host's KVM that never change.

Hardware treats page tables, instruction fetches and everything without paging as private, whatever the C-bit.
A kernel relies on that: its real-mode trampoline runs without page tables, and entries of upper tables lack
the C-bit. Here addresses without the C-bit therefore show a page's private bytes as long as the page is
private, and its shared bytes once it has been converted. Addresses with the C-bit show the private bytes.

What `memory.Planes` reports as a nested page fault reaches memory here: a private page without the C-bit, or
the private bytes of a shared page (zeros, or what it had until the VMM discards that side). That is the price
of conversions without a change of KVM's slots, which would stop every vCPU and throw away the host's page
tables.
"""

from __future__ import annotations

import mmap
import threading
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, Final

from swsnp.cpu.plain_kvm.host import address_of
from swsnp.cpu.plain_kvm.memory import PlanesBase, Window
from swsnp.errors import HostError
from swsnp.hardware.memory import MAP_NORESERVE

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.cpu.plain_kvm.host import HostKvm
    from swsnp.cpu.plain_kvm.memory import GuestPhysicalMemory, MemorySlot

__all__ = ["WholePlanes"]

_LARGE: Final = 2 << 20


@dataclass(slots=True)
class _Ram:
    """One memslot of the hypervisor, with its planes' addresses in this process.

    `edges` is where, by GPA, the shared ranges that plain addresses show begin and end in turn.
    """

    gpa: int
    size: int
    private: memoryview
    plain: memoryview
    private_address: int
    shared_address: int
    plain_address: int
    edges: list[int]


class WholePlanes(PlanesBase):
    """Both planes of every slot, mapped as a whole; both have to be `SystemMemory` that is shareable."""

    def __init__(self, host: HostKvm, vm: int, memory: GuestPhysicalMemory, c_bit: int) -> None:
        super().__init__(host, vm, memory, c_bit)
        self._ram: list[_Ram] = []
        self._lock = threading.Lock()

    def refresh(self) -> None:
        """Show plain addresses as the attributes are now.

        Raises:
            HostError: the host's KVM or its kernel refused.
        """
        with self._lock:
            self.generation = self._memory.generation
            if not self._ram:
                self._ram = [self._map(number, slot) for number, slot in enumerate(self._memory.slots())]
            for ram in self._ram:
                self._show(ram)

    def _map(self, number: int, slot: MemorySlot) -> _Ram:
        private, shared = slot.private_view, slot.shared_view
        if private is None or shared is None or len(shared) != slot.size:
            raise HostError(f"memory at {slot.gpa:#x}: wanted both planes mapped as a whole")
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        area = memoryview(mmap.mmap(-1, slot.size + _LARGE, flags=flags))
        # pages of 2 MiB are mapped as such only where both addresses lie alike in them
        start = (address_of(private) - address_of(area)) % _LARGE
        plain = area[start : start + slot.size]
        addresses = address_of(private), address_of(shared), address_of(plain)
        ram = _Ram(slot.gpa, slot.size, private, plain, *addresses, [])
        self._alias(ram, ram.private_address, slot.gpa, slot.gpa + slot.size)
        self._set(2 * number, slot.gpa, slot.size, ram.plain_address)
        self._set(2 * number + 1, slot.gpa | self.private_bit, slot.size, ram.private_address)
        return ram

    def _show(self, ram: _Ram) -> None:
        shared_runs = ((start, end) for start, end, private in self.runs(ram.gpa, ram.size) if not private)
        edges = list(chain.from_iterable(shared_runs))
        # an edge that is in both lists changes nothing beside it, so those in one of them bound what changed
        changed = sorted(set(edges).symmetric_difference(ram.edges))
        for start, end in zip(changed[::2], changed[1::2], strict=True):
            first, behind = bisect_right(edges, start), bisect_left(edges, end)
            shared = first % 2 == 1
            for begin, upto in pairwise((start, *edges[first:behind], end)):
                self._alias(ram, ram.shared_address if shared else ram.private_address, begin, upto)
                shared = not shared
        ram.edges = edges

    def _alias(self, ram: _Ram, plane: int, start: int, end: int) -> None:
        offset = start - ram.gpa
        try:
            self._host.alias(plane + offset, end - start, ram.plain_address + offset)
        except OSError as error:
            raise HostError(
                f"memory at {start:#x}: mremap: {error.strerror or error}; remedy: raise vm.max_map_count"
            ) from error

    def windows(self, address: int, size: int) -> Iterator[tuple[int, memoryview]]:
        """As `Planes`."""
        for ram in self._ram:
            plain = Window(ram.gpa, _own(ram.plain, ram.plain_address))
            private = Window(ram.gpa | self.private_bit, _own(ram.private, ram.private_address))
            for window in (plain, private):
                if (part := window.part(address, size)) is not None:
                    yield part


def _own(view: memoryview, address: int) -> memoryview:
    """A view of the same bytes that no other thread slices; see `SystemMemory`."""
    whole = memoryview(view.obj)
    start = address - address_of(whole)
    return whole[start : start + len(view)]
