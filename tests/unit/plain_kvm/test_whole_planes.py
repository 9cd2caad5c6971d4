"""Memory for a whole kernel: slots that never change, and aliases that follow the attributes."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.plain_kvm.conftest import ScriptedKvm, ScriptedMemory

from swsnp.abi.kvm import MemoryAttribute
from swsnp.cpu.plain_kvm.host import LinuxKvm, address_of
from swsnp.cpu.plain_kvm.ioctls import HostIoctl
from swsnp.cpu.plain_kvm.memory import Planes
from swsnp.cpu.plain_kvm.vm import HostVm
from swsnp.errors import HostError
from swsnp.hardware.memory import SystemMemory
from swsnp.hypervisor.attributes import AttributeMap

PRIVATE = 1 << 47
PAGE = 4096


@pytest.fixture
def vm(kvm: ScriptedKvm, memory: ScriptedMemory) -> HostVm:
    return HostVm(kvm, memory, whole_kernel=True)


def aliases(kvm: ScriptedKvm, vm: HostVm, memory: ScriptedMemory) -> list[tuple[str, int, int]]:
    """What was aliased since the last time: the plane, GPA and bytes."""
    planes = {"private": address_of(memory.private), "shared": address_of(memory.shared)}
    found = []
    for source, size, _ in kvm.aliases:
        name = next(each for each, base in planes.items() if base <= source < base + memory.size)
        found.append((name, source - planes[name], size))
    kvm.aliases.clear()
    return found


def test_two_slots(kvm: ScriptedKvm, memory: ScriptedMemory, vm: HostVm) -> None:
    """All memory at GPA and once more at GPA | C-bit, which is the private plane itself."""
    vm.prepare()
    slots = {each.guest_phys_addr: each for each in kvm.regions.values()}
    assert sorted(slots) == [0, PRIVATE]
    assert {each.memory_size for each in slots.values()} == {memory.size}
    assert slots[PRIVATE].userspace_addr == address_of(memory.private)
    assert aliases(kvm, vm, memory) == [("private", 0, memory.size)]
    assert slots[0].userspace_addr not in (address_of(memory.private), address_of(memory.shared))


def test_conversions(kvm: ScriptedKvm, memory: ScriptedMemory, vm: HostVm) -> None:
    """A converted page shows its other plane at its plain address; KVM's slots stay as they are."""
    vm.prepare()
    asked = len(kvm.arguments(HostIoctl.KVM_SET_USER_MEMORY_REGION))
    kvm.aliases.clear()
    memory.share(0x3000, 0x2000)
    vm.prepare()
    assert aliases(kvm, vm, memory) == [("shared", 0x3000, 0x2000)]
    memory.share(0x5000)
    vm.prepare()
    assert aliases(kvm, vm, memory) == [("shared", 0x5000, PAGE)]
    memory.attributes.set(4, 5, 8)
    vm.prepare()
    assert aliases(kvm, vm, memory) == [("private", 0x4000, PAGE)]
    vm.prepare()
    assert aliases(kvm, vm, memory) == []
    assert len(kvm.arguments(HostIoctl.KVM_SET_USER_MEMORY_REGION)) == asked


def test_windows(kvm: ScriptedKvm, memory: ScriptedMemory, vm: HostVm) -> None:
    """Code is found at its private address, for rewriting and for errors."""
    vm.prepare()
    memory.private[0x1234] = 7
    ((address, part),) = vm.planes.windows(PRIVATE | 0x1234, 1)
    assert (address, part[0]) == (PRIVATE | 0x1234, 7)
    assert list(vm.planes.windows(memory.size, PAGE)) == []


def test_windows_are_views_of_their_own(memory: ScriptedMemory, vm: HostVm) -> None:
    """Python 3.14t counts the users of a view's buffer without a lock: no two threads may share one."""
    vm.prepare()
    buffers = []
    for place in (0x1000, PRIVATE | 0x1000):
        for _ in range(2):
            ((_, part),) = vm.planes.windows(place, PAGE)
            buffers += [each for each in gc.get_referents(part) if "managedbuffer" in str(type(each))]
    (slot,) = memory.slots()
    buffers += gc.get_referents(slot.private_view)
    assert len({id(each) for each in buffers}) == 5


@pytest.mark.parametrize("what", ["no shared", "no private", "short"])
def test_both_planes_are_wanted(kvm: ScriptedKvm, memory: ScriptedMemory, vm: HostVm, what: str) -> None:
    """Memory of which a plane is missing, or ends early, cannot be shown as a whole."""
    (slot,) = memory.current
    changed = {
        "no shared": replace(slot, shared_view=None),
        "no private": replace(slot, private_view=None),
        "short": replace(slot, shared_view=memory.shared[:0x3000]),
    }
    memory.current = (changed[what],)
    with pytest.raises(HostError, match="both planes"):
        vm.prepare()


def test_alias_refused(
    kvm: ScriptedKvm, memory: ScriptedMemory, vm: HostVm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's kernel may run out of mappings: the error says what to raise."""

    def refuse(source: int, size: int, target: int) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(kvm, "alias", refuse)
    with pytest.raises(HostError, match=r"mremap: Cannot allocate memory; remedy: raise vm.max_map_count"):
        vm.prepare()


def test_alias_on_linux() -> None:
    """mremap(2) with an old size of 0: both addresses reach the same pages, in both directions."""
    system = SystemMemory(shareable=True)
    source = system.view(system.allocate(4 * PAGE), 4 * PAGE)
    target = memoryview(mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    source[PAGE : PAGE + 4] = b"here"
    LinuxKvm().alias(address_of(source[PAGE:]), 2 * PAGE, address_of(target[2 * PAGE :]))
    assert bytes(target[2 * PAGE : 2 * PAGE + 4]) == b"here"
    target[3 * PAGE] = 9
    assert source[2 * PAGE] == 9
    with pytest.raises(OSError, match="Invalid argument"):
        LinuxKvm().alias(address_of(source) + 1, PAGE, address_of(target))


def test_discarded_memory_is_empty_everywhere() -> None:
    """MADV_REMOVE: pages that a conversion throws away read as zeros, at every address."""
    system = SystemMemory(shareable=True)
    base = system.allocate(2 * PAGE)
    system.write(base, b"secret")
    target = memoryview(mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    LinuxKvm().alias(address_of(system.view(base, 2 * PAGE)), 2 * PAGE, address_of(target))
    system.discard(base, PAGE)
    assert system.read(base, 6) == bytes(6)
    assert ctypes.string_at(address_of(target), 6) == bytes(6)


FRAMES = st.sets(st.integers(0, 15), max_size=12)


@given(st.lists(FRAMES, min_size=1, max_size=4))
def test_conversions_of_every_form(steps: list[set[int]]) -> None:
    """What is aliased anew is exactly what changed, in as few pieces, to the plane that is meant now."""
    kvm, memory = ScriptedKvm(), ScriptedMemory()
    vm = HostVm(kvm, memory, whole_kernel=True)
    vm.prepare()
    aliases(kvm, vm, memory)
    shown: set[int] = set()
    for shared in steps:
        memory.attributes.set(0, 16, MemoryAttribute.PRIVATE)
        for frame in shared:
            memory.attributes.set(frame, frame + 1, 0)
        vm.prepare()
        found = aliases(kvm, vm, memory)
        wanted = {frame: "shared" if frame in shared else "private" for frame in shared ^ shown}
        frames = [(at >> 12, name) for name, gpa, size in found for at in range(gpa, gpa + size, PAGE)]
        assert sorted(frames) == sorted(wanted.items())
        pieces = [frame for frame, plane in wanted.items() if wanted.get(frame - 1) != plane]
        assert len(found) == len(pieces)
        shown = shared
    vm.close()


@given(FRAMES, st.integers(0, 40), st.integers(1, 41))
def test_runs_of_a_range(private: set[int], first: int, npages: int) -> None:
    """A range is cut where its attributes change, and nowhere else."""
    attributes = AttributeMap()
    for frame in private:
        attributes.set(frame, frame + 1, MemoryAttribute.PRIVATE)
    planes = Planes(LinuxKvm(), -1, SimpleNamespace(attributes=attributes), 47)
    found = planes.runs(first * PAGE, npages * PAGE)
    assert [start for start, _, _ in found[1:]] == [end for _, end, _ in found[:-1]]
    assert (found[0][0], found[-1][1]) == (first * PAGE, (first + npages) * PAGE)
    assert all(before[2] != after[2] for before, after in pairwise(found))
    shown = {frame for start, end, flag in found if flag for frame in range(start // PAGE, end // PAGE)}
    assert shown == private & set(range(first, first + npages))
