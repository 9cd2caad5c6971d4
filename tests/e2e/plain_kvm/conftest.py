"""Real guests on the host's /dev/kvm, over a memory that knows attributes and validation."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import pytest

from swsnp.abi.kvm import MemoryAttribute
from swsnp.cpu.plain_kvm import (
    FlatStart,
    HostVm,
    LinuxKvm,
    PlainKvmProcessor,
    boot_pages,
    c_bit_position,
    probe,
)
from swsnp.hardware.exits import GuestAccessFault, NestedPageFault
from swsnp.hypervisor.attributes import AttributeMap

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Skip

PAGE = 4096
SIZE = 0x10000
TABLES = 0x1000
CODE = 0x8000


@dataclass(frozen=True)
class Slot:
    gpa: int
    size: int
    shared_view: memoryview
    private_view: memoryview


@dataclass
class GuestMemory:
    """64 KiB, all private and validated at first; a page is accessible in the plane of its attribute only."""

    validated: set[int] = field(default_factory=lambda: set(range(0, SIZE, PAGE)))
    adjusted: list[tuple[int, int, int, bool]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._generation = 0
        self.shared = memoryview(mmap.mmap(-1, SIZE))
        self.private = memoryview(mmap.mmap(-1, SIZE))

        self._slots = (Slot(0, SIZE, self.shared, self.private),)
        self.attributes = AttributeMap()
        self.make_private(0, SIZE)

    def make_private(self, gpa: int, size: int = PAGE) -> None:
        self.attributes.set(gpa // PAGE, (gpa + size) // PAGE, MemoryAttribute.PRIVATE)

    def make_shared(self, gpa: int, size: int = PAGE) -> None:
        self.attributes.set(gpa // PAGE, (gpa + size) // PAGE, 0)

    def slots(self) -> tuple[Slot, ...]:
        return self._slots

    def _plane(self, gpa: int, *, private: bool, write: bool) -> memoryview:
        if gpa >= SIZE or bool(self.attributes.get(gpa // PAGE)) != private:
            raise GuestAccessFault(NestedPageFault(gpa, private, write))
        return self.private if private else self.shared

    def read(self, gpa: int, size: int, *, private: bool) -> bytes:
        return bytes(self._plane(gpa, private=private, write=False)[gpa : gpa + size])

    def write(self, gpa: int, data: bytes, *, private: bool) -> None:
        self._plane(gpa, private=private, write=True)[gpa : gpa + len(data)] = data

    @property
    def generation(self) -> int:
        """Another one each time: whatever a test has changed is looked at."""
        self._generation += 1
        return self._generation

    def pvalidate(self, gpa: int, *, validate: bool, page_size: int = 0) -> tuple[int, bool]:
        self._plane(gpa, private=True, write=True)
        if page_size:
            return 6, False
        unchanged = (gpa in self.validated) == validate
        (self.validated.add if validate else self.validated.discard)(gpa)
        return 0, unchanged

    def rmpadjust(self, gpa: int, *, vmpl: int, permissions: int, vmsa: bool, page_size: int = 0) -> int:
        self._plane(gpa, private=True, write=True)
        if page_size:
            return 6
        self.adjusted.append((gpa, vmpl, permissions, vmsa))
        return 0 if vmpl else 2


class Boot(Protocol):
    """Puts code at 0x8000 into private memory and makes a processor that starts there."""

    def __call__(self, code: str) -> PlainKvmProcessor: ...


@pytest.fixture(scope="session")
def c_bit(cannot_run: Skip) -> int:
    """The host's C-bit; ends the test where guests cannot run."""
    verdict = probe()
    if not verdict.usable:
        cannot_run(verdict.reason, verdict.remedy, avoidable=False)
    return c_bit_position(LinuxKvm())


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory()


@pytest.fixture
def boot(c_bit: int, memory: GuestMemory) -> Iterator[Boot]:
    processors: list[PlainKvmProcessor] = []

    def make(code: str) -> PlainKvmProcessor:
        tables, text = boot_pages(TABLES, c_bit=c_bit), bytes.fromhex(code)
        memory.private[TABLES : TABLES + len(tables)] = tables
        memory.private[CODE : CODE + len(text)] = text
        start = FlatStart(entry=CODE, tables=TABLES, stack=0xA000)
        executable = [range(CODE, CODE + PAGE)]
        processors.append(PlainKvmProcessor(HostVm(LinuxKvm(), memory, executable), memory, start=start))
        return processors[-1]

    yield make
    for each in processors:
        each.close()
