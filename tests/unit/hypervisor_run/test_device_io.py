"""Port and memory-mapped IO, scratch area. Source: GHCB 2.0; Linux, x86.c and setup_vmgexit_scratch."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField
from swsnp.abi.kvm import EXIT_UNION, ExitIo, ExitMmio, ExitReason

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

ALL = ["coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"]
READ, STRING = 1, 4
PIO = 4096
BUFFER = 0x800
OUTSIDE = 0x8000
DEVICE = 0xFED0_0000


def info(port: int, size: int, *flags: int) -> int:
    return port << 16 | size << 4 | sum(flags)


def io_exit(vm: World) -> tuple[int, int, int, int, int]:
    """Direction, size, port, count, data_offset."""
    assert vm.exit_reason == ExitReason.IO
    left = ExitIo.parse_at(vm.area, EXIT_UNION)
    return left.direction, left.size, left.port, left.count, left.data_offset


def mmio_exit(vm: World) -> tuple[int, int, int]:
    """Address, length, is_write."""
    assert vm.exit_reason == ExitReason.MMIO
    left = ExitMmio.parse_at(vm.area, EXIT_UNION)
    return left.phys_addr, left.len, left.is_write


def version_1(world: MakeWorld) -> World:
    vm = world("linux-6.12")
    vm.sev.ghcb_version = 1
    return vm


# Ports: one item


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(("size", "data"), [(1, "88"), (2, "8877"), (4, "88776655")])
def test_out(world: MakeWorld, profile: str, size: int, data: str) -> None:
    """OUT: KVM_EXIT_IO with the low bytes of RAX in the data page; nothing comes back."""
    vm = world(profile)
    vm.area[PIO : PIO + 8] = b"\x5a" * 8
    assert vm.ask_run(ExitCode.IOIO, info(0x3F8, size), rax=0x1122334455667788) == 0
    assert io_exit(vm) == (1, size, 0x3F8, 1, PIO)
    assert vm.area[PIO : PIO + 8].hex() == data + "5a" * (8 - size)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert vm.get(GhcbField.RAX) == 0x1122334455667788


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(
    ("size", "rax"), [(1, 0x11223344556677A1), (2, 0x112233445566A2A1), (4, 0x00000000A4A3A2A1)]
)
def test_in(world: MakeWorld, profile: str, size: int, rax: int) -> None:
    """IN: the page is zeros at the exit; 8 and 16 bits are merged into RAX, 32 bits replace it."""
    vm = world(profile)
    vm.area[PIO : PIO + 4] = b"\x5a" * 4
    assert vm.ask_run(ExitCode.IOIO, info(0x3FD, size, READ), rax=0x1122334455667788) == 0
    assert io_exit(vm) == (0, size, 0x3FD, 1, PIO)
    assert vm.area[PIO : PIO + size] == bytes(size)
    vm.area[PIO : PIO + 4] = b"\xa1\xa2\xa3\xa4"
    assert vm.resumed(vm.run())
    assert vm.get(GhcbField.RAX) == rax


@pytest.mark.parametrize("flags", [(), (READ,), (STRING,), (READ, STRING)])
def test_port_size_0(world: MakeWorld, flags: tuple[int, ...]) -> None:
    """A length of 0 is ignored ("KVM: SEV: Ignore Port I/O requests of length '0'"), scratch area or not."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.IOIO, info(0x80, 0, *flags), 5, rax=1, scratch=1))
    assert vm.reply == (0, 0)


def test_completion_with_immediate_exit(world: MakeWorld) -> None:
    """The value is taken by the KVM_RUN that ends with -EINTR; the guest finds it at its next entry."""
    vm = world()
    vm.ask_run(ExitCode.IOIO, info(0x60, 1, READ))
    vm.area[PIO] = 0x42
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    vm.area[PIO] = 0
    vm.immediate_exit(0)
    assert vm.resumed(vm.run())
    assert vm.get(GhcbField.RAX) == 0x42


# Ports: the string form


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 3), (4, 508)])
def test_outs(world: MakeWorld, profile: str, size: int, count: int) -> None:
    """OUTS: count items from the scratch area in one exit, up to all of the 2,032 bytes."""
    vm = world(profile)
    data = bytes(each & 0xFF for each in range(size * count))
    vm.page[BUFFER : BUFFER + len(data)] = data
    assert vm.ask_run(ExitCode.IOIO, info(0x402, size, STRING), count, scratch=vm.GHCB + BUFFER) == 0
    assert io_exit(vm) == (1, size, 0x402, count, PIO)
    assert vm.area[PIO : PIO + len(data)] == data
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("profile", ALL)
def test_ins(world: MakeWorld, profile: str) -> None:
    """INS: what userspace read goes to the scratch area, at any offset of it, and nowhere else."""
    vm = world(profile)
    at = BUFFER + 0x123
    vm.page[at - 1 : at + 9] = b"\x5a" * 10
    assert vm.ask_run(ExitCode.IOIO, info(0x1F0, 2, READ, STRING), 4, scratch=vm.GHCB + at) == 0
    assert io_exit(vm) == (0, 2, 0x1F0, 4, PIO)
    vm.area[PIO : PIO + 8] = b"ABCDEFGH"
    assert vm.resumed(vm.run())
    assert vm.page[at - 1 : at + 9].tobytes() == b"ZABCDEFGHZ"


@pytest.mark.parametrize(
    ("size", "count", "result"),
    [
        (1, 0, None),
        (4, 0, None),
        (1, 1 << 31, -errno.EINVAL),
        (4, 1 << 29, -errno.EINVAL),
        (1, (1 << 64) - 1, -errno.EINVAL),
        (4, (1 << 29) - 1, (2, 3)),
        (1, (1 << 31) - 1, (2, 3)),
        (1, 2033, (2, 3)),
        (4, 509, (2, 3)),
    ],
)
def test_string_length(world: MakeWorld, size: int, count: int, result: int | tuple[int, int] | None) -> None:
    """Count 0: resumed; more than INT_MAX bytes: -EINVAL to the VMM; more than the buffer: info2=3."""
    vm = world()
    got = vm.ask_run(ExitCode.IOIO, info(0x402, size, STRING), count, scratch=vm.GHCB + BUFFER)
    if isinstance(result, int):
        assert got == result
    else:
        assert vm.resumed(got)
        assert vm.reply == (result or (0, 0))


def test_a_string_of_no_items_needs_no_scratch_area(world: MakeWorld) -> None:
    """Count 0 is ignored before the scratch area is looked at, as other requests of length 0."""
    vm = world()
    assert vm.resumed(vm.ask_run(ExitCode.IOIO, info(0x402, 1, STRING), 0, scratch=OUTSIDE))
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("read", [False, True])
def test_long_string_of_version_1(world: MakeWorld, read: bool) -> None:
    """Version 1 allows 16 pages elsewhere: one exit a page; INS is written back at the next entry."""
    vm = version_1(world)
    data = bytes(each * 7 & 0xFF for each in range(4096 + 4096 + 20))
    vm.memory.host_write(OUTSIDE, bytes(len(data)) if read else data)
    flags = (READ, STRING) if read else (STRING,)
    assert vm.ask_run(ExitCode.IOIO, info(0x1F0, 2, *flags), len(data) // 2, scratch=OUTSIDE) == 0
    for start in range(0, len(data), 4096):
        piece = data[start : start + 4096]
        assert io_exit(vm) == (0 if read else 1, 2, 0x1F0, len(piece) // 2, PIO)
        if read:
            vm.area[PIO : PIO + len(piece)] = piece
        else:
            assert vm.area[PIO : PIO + len(piece)] == piece
        assert vm.memory.host_read(OUTSIDE, 4) == (bytes(4) if read else data[:4])
        result = vm.run()
    assert vm.resumed(result)
    assert vm.memory.host_read(OUTSIDE, len(data)) == data


# Memory


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("length", [1, 2, 4, 8, 3])
def test_mmio_write(world: MakeWorld, profile: str, length: int) -> None:
    """MMIO_WRITE: KVM_EXIT_MMIO with the data; bytes beyond the length keep what they were."""
    vm = world(profile)
    vm.area[32:64] = b"\x5a" * 32
    vm.page[BUFFER : BUFFER + 8] = b"abcdefgh"
    assert vm.ask_run(ExitCode.MMIO_WRITE, DEVICE, length, scratch=vm.GHCB + BUFFER) == 0
    assert mmio_exit(vm) == (DEVICE, length, 1)
    assert vm.area[40:48] == b"abcdefgh"[:length] + b"\x5a" * (8 - length)
    assert vm.area[53:64] == b"\x5a" * 11
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("length", [1, 2, 4, 8])
def test_mmio_read(world: MakeWorld, profile: str, length: int) -> None:
    """MMIO_READ: what userspace put into `data` goes to the scratch area."""
    vm = world(profile)
    vm.page[BUFFER : BUFFER + 9] = b"\x5a" * 9
    assert vm.ask_run(ExitCode.MMIO_READ, DEVICE, length, scratch=vm.GHCB + BUFFER) == 0
    assert mmio_exit(vm) == (DEVICE, length, 0)
    vm.area[40:48] = b"ABCDEFGH"
    assert vm.resumed(vm.run())
    assert vm.page[BUFFER : BUFFER + 9] == b"ABCDEFGH"[:length] + b"\x5a" * (9 - length)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("code", [ExitCode.MMIO_READ, ExitCode.MMIO_WRITE])
@pytest.mark.parametrize(
    ("length", "scratch", "reply"),
    [
        (0, 0, (0, 0)),  # ignored before anything else
        (9, 0, (2, 5)),
        ((1 << 64) - 1, 0x1800, (2, 5)),
        (8, 0, (2, 3)),
        (8, 0x1FE9, (2, 3)),
        (1, 0x1FF0, (2, 3)),
        (1, 0x17FF, (2, 3)),
        (8, OUTSIDE, (2, 3)),
        (1, (1 << 64) - 1, (2, 3)),
    ],
)
def test_mmio_refused(
    world: MakeWorld, profile: str, code: int, length: int, scratch: int, reply: tuple[int, int]
) -> None:
    """Length 0: resumed. More than 8 with version 2: info2=5. Then the scratch area's rules: info2=3."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(code, DEVICE, length, scratch=scratch))
    assert vm.reply == reply


def test_scratch_area_ends_with_the_buffer(world: MakeWorld) -> None:
    """The last 8 bytes of the shared buffer (FE8h to FEFh) can be used."""
    vm = world()
    assert vm.ask_run(ExitCode.MMIO_READ, DEVICE, 8, scratch=vm.GHCB + 0xFE8) == 0
    vm.area[40:48] = b"ABCDEFGH"
    assert vm.resumed(vm.run())
    assert vm.page[0xFE8:0xFF1].tobytes() == b"ABCDEFGH\0"


def test_mmio_pieces_of_version_1(world: MakeWorld) -> None:
    """Version 1 allows more than 8 bytes: pieces of 8, each with its own address, which wraps."""
    vm = version_1(world)
    start = (1 << 64) - 8
    vm.memory.host_write(OUTSIDE, b"\x5a" * 22)
    assert vm.ask_run(ExitCode.MMIO_READ, start, 20, scratch=OUTSIDE) == 0
    for address, length, data in ((start, 8, b"01234567"), (0, 8, b"89abcdef"), (8, 4, b"ghij")):
        assert mmio_exit(vm) == (address, length, 0)
        vm.area[40 : 40 + length] = data
        result = vm.run()
    assert vm.resumed(result)
    assert vm.memory.host_read(OUTSIDE, 22) == b"0123456789abcdefghijZZ"


@pytest.mark.parametrize(
    ("length", "scratch", "result"),
    [
        (16 * 4096 + 1, OUTSIDE, None),
        (16 * 4096, 0x3_8000, -errno.EFAULT),
        (8, 0x10_0000_0000, -errno.EFAULT),
    ],
)
def test_scratch_limits_of_version_1(world: MakeWorld, length: int, scratch: int, result: int | None) -> None:
    """Version 1 elsewhere: more than 16 pages is info2=3, memory that cannot be read -EFAULT to the VMM."""
    vm = version_1(world)
    got = vm.ask_run(ExitCode.MMIO_WRITE, DEVICE, length, scratch=scratch)
    if result is None:
        assert vm.resumed(got)
        assert vm.reply == (2, 3)
    else:
        assert got == result


def test_scratch_area_of_version_1_not_writable(world: MakeWorld) -> None:
    """A copy that cannot be written back is lost; the guest goes on."""
    vm = version_1(world)
    vm.ask_run(ExitCode.MMIO_READ, DEVICE, 8, scratch=OUTSIDE)
    vm.memory.read_only.add(OUTSIDE // 4096)
    vm.area[40:48] = b"ABCDEFGH"
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert vm.memory.host_read(OUTSIDE, 8) == bytes(8)


def test_mmio_write_of_version_1_is_not_written_back(world: MakeWorld) -> None:
    """The copy of a write is only read: what the guest stored there meanwhile stays."""
    vm = version_1(world)
    vm.memory.host_write(OUTSIDE, b"original")
    vm.ask_run(ExitCode.MMIO_WRITE, DEVICE, 8, scratch=OUTSIDE)
    assert vm.area[40:48].tobytes() == b"original"
    vm.memory.host_write(OUTSIDE, b"later on")
    assert vm.resumed(vm.run())
    assert vm.memory.host_read(OUTSIDE, 8) == b"later on"
