"""A host kernel that does what a test's script says, and writes down what the VMM did."""

from __future__ import annotations

import errno
import mmap
from collections import defaultdict
from typing import TYPE_CHECKING

from swsnp.abi.kvm import (
    VCPU_MMAP_SIZE,
    Capability,
    Ioctl,
    KvmDeviceAttr,
    KvmEnableCap,
    KvmMemoryAttributes,
    KvmSevCmd,
    KvmSevSnpLaunchUpdate,
    MpState,
    SevCommand,
    VmType,
)
from swsnp.hardware import BusError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["FakeHost", "Run"]

Run = "Callable[[memoryview], int]"
_PLAIN_RESULT = {"KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_CREATE_GUEST_MEMFD"}


class FakeHost:
    """`steps` lists what the VMM did; `answers` replaces a step's result; `runs` scripts KVM_RUN."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.answers: dict[str, int | list[int]] = {}
        self.errors: dict[str, int] = {}
        self.payloads: dict[str, bytes] = {}
        self.extensions = {Capability.VM_TYPES: 1 << VmType.DEFAULT | 1 << VmType.SNP}
        self.attributes: dict[tuple[int, int], int] = {}
        self.runs: dict[int, list[Callable[[memoryview], int]]] = defaultdict(list)
        self.vcpus: dict[int, tuple[int, memoryview]] = {}
        self.mp_states: dict[int, int] = defaultdict(lambda: MpState.HALTED)
        self.immediate_exits: list[int] = []
        self.open_fds: set[int] = set()
        self.memory: dict[int, mmap.mmap] = {}
        self.memfds: dict[int, int] = {}
        self.passable: list[bool] = []
        self.discarded: list[tuple[str, int, int]] = []
        self.conversions: list[tuple[int, int, int]] = []
        self.update_pages = 1 << 20
        self.updates: list[tuple[int, int, int]] = []
        self.interrupted: list[int] = []
        self.on_interrupt: Callable[[int], None] = lambda _: None
        self._next_fd, self._next_address = 3, 0x7F00_0000_0000

    # --- descriptors and memory

    def _new_fd(self) -> int:
        self._next_fd += 1
        self.open_fds.add(self._next_fd)
        return self._next_fd

    def open(self, path: str) -> int:
        self.steps.append(f"open {path}")
        if (result := self._answer(f"open {path}")) < 0:
            return result
        return self._new_fd()

    def close(self, fd: int) -> int:
        if fd not in self.open_fds:
            return -errno.EBADF
        self.open_fds.remove(fd)
        return 0

    def map_vcpu(self, fd: int) -> memoryview:
        return self.vcpus[fd][1]

    def memfd_of(self, address: int) -> int | None:
        return self.memfds.get(address)

    def allocate(self, size: int, *, passable: bool = False) -> int:
        self.passable.append(passable)
        address = self._next_address
        self._next_address += size + 0x10000
        self.memory[address] = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def _find(self, address: int, size: int) -> tuple[mmap.mmap, int]:
        for base, content in self.memory.items():
            if base <= address and address + size <= base + len(content):
                return content, address - base
        raise BusError(f"user address {address:#x}: {size} bytes are not mapped")

    def read(self, address: int, size: int) -> bytes:
        content, offset = self._find(address, size)
        return bytes(content[offset : offset + size])

    def write(self, address: int, data: bytes | bytearray | memoryview) -> None:
        content, offset = self._find(address, len(data))
        content[offset : offset + len(data)] = bytes(data)

    def discard(self, address: int, size: int) -> int:
        self.discarded.append(("shared", address, size))
        return self._answer("discard")

    def interrupt_vcpu(self, fd: int) -> None:
        self.interrupted.append(fd)
        self.on_interrupt(fd)

    def discard_memfd(self, fd: int, offset: int, size: int) -> int:
        self.discarded.append((f"memfd {fd}", offset, size))
        return self._answer("discard_memfd")

    # --- ioctls

    def _answer(self, step: str) -> int:
        answer = self.answers.get(step, 0)
        if isinstance(answer, list):
            return answer.pop(0) if answer else 0
        return answer

    def ioctl(self, fd: int, request: int, arg: int | bytearray | memoryview = 0) -> int:
        if fd not in self.open_fds:
            return -errno.EBADF
        if request == Ioctl.KVM_RUN:
            return self._run(fd)
        if request == Ioctl.KVM_CHECK_EXTENSION:
            assert isinstance(arg, int)
            return self.extensions.get(Capability(arg), 0)
        if isinstance(arg, int):
            return self._plain(Ioctl(request).name, arg)
        return self._structured(fd, Ioctl(request), arg)

    def _plain(self, step: str, arg: int) -> int:
        self.steps.append(f"{step} {arg}")
        if (result := self._answer(step)) < 0:
            return result
        fd = self._new_fd()
        if step == "KVM_CREATE_VCPU":
            self.vcpus[fd] = arg, memoryview(bytearray(VCPU_MMAP_SIZE))
        return fd

    def _structured(self, fd: int, request: Ioctl, arg: bytearray | memoryview) -> int:
        if request == Ioctl.KVM_MEMORY_ENCRYPT_OP:
            return self._sev(arg)
        if request == Ioctl.KVM_GET_MP_STATE:
            arg[:] = self.mp_states[self.vcpus[fd][0]].to_bytes(4, "little")
            return self._answer("KVM_GET_MP_STATE")
        if request in (Ioctl.KVM_HAS_DEVICE_ATTR, Ioctl.KVM_GET_DEVICE_ATTR):
            return self._attribute(request, KvmDeviceAttr.parse(arg))
        step = request.name
        if request == Ioctl.KVM_ENABLE_CAP:
            cap = KvmEnableCap.parse(arg)
            step = f"KVM_ENABLE_CAP {cap.cap} {cap.args[0]:#x}"
        if request == Ioctl.KVM_SET_MEMORY_ATTRIBUTES:
            wanted = KvmMemoryAttributes.parse(arg)
            self.conversions.append((wanted.address, wanted.size, wanted.attributes))
        self.steps.append(step)
        self.payloads[step] = bytes(arg)
        result = self._answer(step)
        return self._new_fd() if result == 0 and step in _PLAIN_RESULT else result

    def _attribute(self, request: Ioctl, wanted: KvmDeviceAttr) -> int:
        value = self.attributes.get((wanted.group, wanted.attr))
        if value is None:
            return -errno.ENXIO
        if request == Ioctl.KVM_GET_DEVICE_ATTR:
            self.write(wanted.addr, value.to_bytes(8, "little"))
        return 0

    def _sev(self, arg: bytearray | memoryview) -> int:
        command = KvmSevCmd.parse(arg)
        step = SevCommand(command.id).name
        self.steps.append(step)
        arg[:] = bytes(command.but(error=self.errors.get(step, 0)))
        result = self._answer(step)
        if command.data:
            content, offset = self._find(command.data, 1)
            self.payloads[step] = bytes(content[offset : offset + 4096])
        if step == "SNP_LAUNCH_UPDATE" and result == 0:
            self._update(command.data)
        return result

    def _update(self, address: int) -> None:
        todo = KvmSevSnpLaunchUpdate.parse(self.read(address, KvmSevSnpLaunchUpdate.SIZE))
        done = min(todo.len // 4096, self.update_pages)
        self.updates.append((todo.gfn_start, done, todo.type))
        left = todo.but(
            gfn_start=todo.gfn_start + done, len=todo.len - done * 4096, uaddr=todo.uaddr + done * 4096
        )
        self.write(address, bytes(left))

    def _run(self, fd: int) -> int:
        vcpu, area = self.vcpus[fd]
        self.immediate_exits.append(area[1])
        if self.runs[vcpu]:
            return self.runs[vcpu].pop(0)(area)
        return -errno.EINTR
