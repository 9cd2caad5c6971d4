"""Reading and writing a waiting thread's memory; our own serves as the thread's."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

import pytest

from swsnp.front.wrap import memory
from swsnp.front.wrap.memory import Caller, TargetMemory, Targets, process_vm_works
from swsnp.guest.caller import CallerFault

PAGE = 4096
PROT_NONE = 0
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Pages:
    """Three pages of which the last is out of bounds."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, 3 * PAGE)
        self._keep = ctypes.c_char.from_buffer(self.map)
        self.address = ctypes.addressof(self._keep)
        self.protect(2, PROT_NONE)

    def protect(self, page: int, protection: int) -> None:
        assert libc.mprotect(self.address + page * PAGE, PAGE, protection) == 0


@pytest.fixture
def pages() -> Pages:
    return Pages()


@pytest.fixture(params=[True, False], ids=["process_vm", "proc_mem"])
def target(request: pytest.FixtureRequest) -> TargetMemory:
    if request.param and not process_vm_works():
        pytest.skip("process_vm_readv is refused here; remedy: a container profile that permits it")
    return TargetMemory(os.getpid(), process_vm=request.param)


def test_read_and_write(target: TargetMemory, pages: Pages) -> None:
    """What is written is there, also over a page boundary."""
    target.write(pages.address + PAGE - 3, b"abcdef")
    assert pages.map[PAGE - 3 : PAGE + 3] == b"abcdef"
    assert target.read(pages.address + PAGE - 4, 8) == b"\0abcdef\0"


@pytest.mark.parametrize("address", [0, 8, (1 << 47) + 5, (1 << 64) - 8, 1 << 64, -1])
def test_addresses_where_nothing_is(target: TargetMemory, address: int) -> None:
    """copy_from_user and copy_to_user fail there."""
    with pytest.raises(CallerFault, match="out of reach"):
        target.read(address, 32)
    with pytest.raises(CallerFault, match="out of reach"):
        target.write(address, bytes(32))


def test_read_across_the_end_of_memory_fails(target: TargetMemory, pages: Pages) -> None:
    """All bytes or none: a structure that ends in an unmapped page is EFAULT."""
    assert target.read(pages.address + 2 * PAGE - 32, 32) == bytes(32)
    with pytest.raises(CallerFault):
        target.read(pages.address + 2 * PAGE - 31, 32)


def test_page_protection_holds(target: TargetMemory, pages: Pages) -> None:
    """The program's own rights count: /proc/PID/mem alone would override them."""
    pages.map[:PAGE] = b"x" * PAGE
    pages.protect(0, mmap.PROT_READ)
    with pytest.raises(CallerFault):
        target.write(pages.address, b"changed")
    assert pages.map[:7] == b"xxxxxxx"
    with pytest.raises(CallerFault):
        target.write(pages.address + PAGE - 4, b"over the boundary")
    pages.protect(0, PROT_NONE)
    with pytest.raises(CallerFault):
        target.read(pages.address, 1)
    pages.protect(0, mmap.PROT_READ | mmap.PROT_WRITE)
    assert target.read(pages.address, 7) == b"xxxxxxx"


@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 4000])
@pytest.mark.parametrize("before_boundary", [0, 1, 200, 1000])
def test_paths(target: TargetMemory, pages: Pages, length: int, before_boundary: int) -> None:
    """Up to the NUL, wherever page boundaries and the size of the first read fall."""
    start = PAGE - before_boundary
    path = bytes(ord("a") + index % 26 for index in range(min(length, 2 * PAGE - start - 1)))
    pages.map[start : start + len(path) + 1] = path + b"\0"
    assert target.read_path(pages.address + start) == path


def test_path_right_before_the_end_of_memory(target: TargetMemory, pages: Pages) -> None:
    """No byte behind the NUL is looked at."""
    pages.map[2 * PAGE - 5 : 2 * PAGE] = b"/dev\0"
    pages.protect(2, PROT_NONE)
    assert target.read_path(pages.address + 2 * PAGE - 5) == b"/dev"


def test_path_without_an_end(target: TargetMemory, pages: Pages) -> None:
    """PATH_MAX is 4096: what is longer the kernel shall refuse."""
    pages.map[: 2 * PAGE] = b"x" * 2 * PAGE
    with pytest.raises(CallerFault):
        target.read_path(pages.address)
    with pytest.raises(CallerFault):
        target.read_path(0)


def test_thread_that_does_not_exist() -> None:
    """Its memory cannot be opened; nothing is read or written."""
    for process_vm in (True, False):
        gone = TargetMemory(0x3FFF_FFFF, process_vm=process_vm)
        with pytest.raises(FileNotFoundError):
            gone.read_path(PAGE)
        with pytest.raises(CallerFault):
            gone.read(PAGE, 8)
        with pytest.raises(CallerFault):
            gone.write(PAGE, b"x")


def test_memory_of_a_program_that_was_replaced(pages: Pages) -> None:
    """After an exec the kept descriptor reads nothing, or an error: it is opened again, once."""
    target = TargetMemory(os.getpid(), process_vm=False)
    pages.map[:5] = b"path\0"
    assert target.read_path(pages.address) == b"path"
    stale = os.open(os.devnull, os.O_RDWR)
    os.dup2(stale, target._mem)  # reads 0 bytes, as /proc/PID/mem of a memory that is gone
    os.close(stale)
    assert target.read_path(pages.address) == b"path"


def test_targets_are_kept_and_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every exec, above a number, and after so many uses, since a thread's number may come back."""
    monkeypatch.setattr(Targets, "_MOST_KEPT", 3)
    monkeypatch.setattr(Targets, "_MOST_USES", 6)
    targets = Targets(process_vm=False)
    first = targets.get(1)
    assert targets.get(1) is first
    targets.get(2)
    targets.get(3)
    assert targets.get(1) is first
    assert targets.get(1) is not first  # sixth use
    again = targets.get(1)
    targets.forget()
    assert targets.get(1) is not again
    kept = targets.get(1)
    for tid in (2, 3, 4):
        targets.get(tid)
    assert targets.get(1) is not kept


def test_memory_closes_its_descriptor(pages: Pages) -> None:
    """Whoever used it last, the main thread or a worker."""
    target = TargetMemory(os.getpid(), process_vm=False)
    pages.map[:2] = b"x\0"
    target.read_path(pages.address)
    number = target._mem
    os.fstat(number)
    del target
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        os.fstat(number)


def test_nothing_is_written_for_a_thread_that_no_longer_waits(target: TargetMemory, pages: Pages) -> None:
    """seccomp_unotify(2): the number may be another thread's by now."""
    waits = [True]
    caller = Caller(target, lambda: waits[0])
    caller.write(pages.address, b"yes")
    waits[0] = False
    with pytest.raises(CallerFault):
        caller.write(pages.address, b"no!")
    assert caller.read(pages.address, 3) == b"yes"


def test_refused_process_vm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Older container profiles answer EPERM."""

    def refused(*_: object) -> int:
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(memory._libc, "process_vm_readv", refused)
    assert not process_vm_works()
