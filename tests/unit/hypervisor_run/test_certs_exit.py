"""The certificate exit and its completion, both generations. Source: the series; Linux 7.2."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField
from swsnp.hardware import PageState
from swsnp.hypervisor.psp_driver import DriverResult

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, World

V1 = ["coco-v1", "coco-v1-revised"]
WITH_EXIT = [*V1, "linux-7.2"]
TOO_SMALL = {"coco-v1": 1, "coco-v1-revised": 1, "linux-7.2": errno.ENOSPC}
INVALID_LEN, BUSY = 1 << 32, 2 << 32
GENERIC_V1, GENERIC = 0x8000000000000000, 0xFFFFFFFF00000000


def left(world: MakeWorld, profile: str, *, rax: int = 0x5000, rbx: int = 4) -> World:
    """A VM that has just left for certificates; the exit union was full of 5Ah before."""
    vm = world(profile, enable=True)
    vm.area[32:288] = b"\x5a" * 256
    vm.message(5)
    assert vm.ask_run(ExitCode.EXT_GUEST_REQUEST, vm.REQUEST, vm.RESPONSE, rax=rax, rbx=rbx) == 0
    assert vm.driver.issued == []
    return vm


def exit_bytes(vm: World) -> dict[int, str]:
    """The bytes that the example of the series' and of the upstream exit names."""
    spans = {8: 4, 32: 8, 40: 8, 48: 4, 52: 4}
    return {at: vm.area[at : at + size].hex() for at, size in spans.items()}


@pytest.mark.parametrize("profile", V1)
def test_exit_of_the_series(world: MakeWorld, profile: str) -> None:
    """KVM_EXIT_COCO (40) with RAX 7F400000h, RBX 4: nr 0, gfn, npages, ret; the padding keeps old bytes."""
    vm = left(world, profile, rax=0x7F400000, rbx=4)
    assert exit_bytes(vm) == {
        8: "28000000",
        32: "005a5a5a5a5a5a5a",
        40: "00f4070000000000",
        48: "04000000",
        52: "00000000",
    }
    assert vm.area[56:288] == b"\x5a" * 232


def test_exit_of_7_2(world: MakeWorld) -> None:
    """KVM_EXIT_SNP_REQ_CERTS (43) with RAX 7F400000h, RBX 4: gpa, npages, ret."""
    vm = left(world, "linux-7.2", rax=0x7F400000, rbx=4)
    assert exit_bytes(vm) == {
        8: "2b000000",
        32: "0000407f00000000",
        40: "0400000000000000",
        48: "00000000",
        52: "00000000",
    }
    assert vm.area[56:288] == b"\x5a" * 232


@pytest.mark.parametrize("profile", WITH_EXIT)
def test_no_room_also_leaves(world: MakeWorld, profile: str) -> None:
    """RBX = 0 leaves for certificates too."""
    vm = left(world, profile, rbx=0)
    layout = vm.vm.profile.cert_exit
    assert layout is not None
    assert vm.vcpu.run.certs_npages(layout) == 0


@pytest.mark.parametrize(
    ("profile", "npages"), [("coco-v1", 0), ("coco-v1-revised", 0), ("linux-7.2", 1 << 32)]
)
def test_large_rbx(world: MakeWorld, profile: str, npages: int) -> None:
    """RBX beyond 32 bits: the series cuts it, upstream passes 64 bits."""
    vm = left(world, profile, rbx=1 << 32)
    layout = vm.vm.profile.cert_exit
    assert layout is not None
    assert vm.vcpu.run.certs_npages(layout) == npages


def test_enabling_belongs_to_the_profile(world: MakeWorld) -> None:
    """The series' mask means nothing to 7.2, the command's switch nothing to the series; 6.12 has no exit."""
    for profile in [*WITH_EXIT, "linux-6.12"]:
        for coco, command in [(1, False), (0, True)]:
            vm = world(profile)
            vm.vm.coco_mask, vm.vm.req_certs = coco, command
            vm.message(5)
            result = vm.ask_run(ExitCode.EXT_GUEST_REQUEST, vm.REQUEST, vm.RESPONSE, rax=vm.DATA, rbx=1)
            wanted = {"linux-7.2": command, "linux-6.12": False}.get(profile, bool(coco))
            assert (result == 0) is wanted


# Completion


@pytest.mark.parametrize("profile", WITH_EXIT)
def test_ok(world: MakeWorld, profile: str) -> None:
    """Ret 0: the request goes to the firmware, RAX and RBX come back as sent, the certificates stay."""
    vm = left(world, profile)
    vm.memory.host_write(vm.DATA, b"\x33" * 8192)
    vm.answer_certs(0, 77)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert (vm.get(GhcbField.RAX), vm.get(GhcbField.RBX)) == (vm.DATA, 4)
    assert vm.response() == vm.driver.fill
    assert vm.memory.host_read(vm.DATA, 8192) == b"\x33" * 8192
    assert len(vm.driver.issued) == 1


@pytest.mark.parametrize("profile", WITH_EXIT)
@pytest.mark.parametrize("npages", [0, 3, 5, 0xFFFFFFFF])
def test_too_small(world: MakeWorld, profile: str, npages: int) -> None:
    """Too small: RBX is what userspace wrote, even less than before; info1=0, info2=1<<32; no firmware."""
    vm = left(world, profile)
    vm.answer_certs(TOO_SMALL[profile], npages)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, INVALID_LEN)
    assert vm.get(GhcbField.RBX) == npages
    assert vm.driver.issued == []
    assert vm.response() == bytes(4096)


def test_too_small_64_bits(world: MakeWorld) -> None:
    """Upstream's npages has 64 bits on the way back too."""
    vm = left(world, "linux-7.2")
    vm.answer_certs(errno.ENOSPC, 0x1_0000_0005)
    assert vm.resumed(vm.run())
    assert vm.get(GhcbField.RBX) == 0x1_0000_0005


RESULTS: list[tuple[str, int, int | None]] = [
    # profile, ret, exit info 2 (None: KVM_RUN -EINVAL)
    *(
        (profile, ret, GENERIC_V1)
        for profile in V1
        for ret in (2, 5, 11, 22, 28, 0x7FFFFFFF, 1 << 31, 0xFFFFFFFF)
    ),
    ("linux-7.2", errno.EAGAIN, BUSY),
    ("linux-7.2", errno.EIO, GENERIC),
    *(("linux-7.2", ret, None) for ret in (1, 2, 22, 1 << 31, 1 << 32, (1 << 32) + errno.EIO, (1 << 64) - 5)),
]


@pytest.mark.parametrize(("profile", "ret", "info2"), RESULTS)
def test_other_results(world: MakeWorld, profile: str, ret: int, info2: int | None) -> None:
    """Retry, generic and unknown results; the firmware is never called."""
    vm = left(world, profile)
    vm.answer_certs(ret)
    result = vm.run()
    if info2 is None:
        assert result == -errno.EINVAL
        assert vm.resumed(vm.run())
        assert vm.reply == (0, 0), "success that never was"
    else:
        assert vm.resumed(result)
        assert vm.reply == (0, info2)
    assert vm.driver.issued == []
    assert vm.get(GhcbField.RBX) == 4
    assert vm.response() == bytes(4096)


@pytest.mark.parametrize("profile", WITH_EXIT)
def test_ghcb_changed_meanwhile(world: MakeWorld, profile: str) -> None:
    """What the guest writes to the GHCB during the exit has no effect: the saved fields are used."""
    vm = left(world, profile)
    for offset in (GhcbField.RAX, GhcbField.RBX, GhcbField.SW_EXIT_INFO_1, GhcbField.SW_EXIT_INFO_2):
        vm.put(offset, vm.UNMAPPED)
    vm.put(GhcbField.SW_EXIT_CODE, 0)
    vm.answer_certs(0)
    assert vm.resumed(vm.run())
    assert vm.reply == (0, 0)
    assert (vm.get(GhcbField.RAX), vm.get(GhcbField.RBX)) == (vm.DATA, 4)
    assert vm.response() == vm.driver.fill


@pytest.mark.parametrize("profile", WITH_EXIT)
def test_request_changed_meanwhile(world: MakeWorld, profile: str) -> None:
    """The request page is read at the completion: a change during the exit counts, even of the type byte."""
    vm = left(world, profile)
    late = vm.message(3)
    vm.answer_certs(0)
    assert vm.resumed(vm.run())
    assert vm.driver.issued[0].request_page == late


def test_firmware_status_after_certificates(world: MakeWorld) -> None:
    """A firmware status at the completion goes to the guest, the VMM sees -EINTR only from immediate_exit."""
    vm = left(world, "linux-7.2")
    vm.driver.results.append(DriverResult(-errno.EIO, 0x27))
    vm.immediate_exit(1)
    assert vm.run() == -errno.EINTR
    assert vm.reply == (0, 0x27)


def test_v1_firmware_error_after_certificates(world: MakeWorld) -> None:
    """V1: a firmware error at the completion is KVM_RUN's result and leaks the response page."""
    vm = left(world, "coco-v1")
    vm.driver.results.append(DriverResult(-errno.EIO, 0x27))
    assert vm.run() == -errno.EIO
    assert vm.rmp.state(vm.memory.host_page_address(vm.RESPONSE)) is PageState.FIRMWARE


def test_v1_disabled_during_the_exit(world: MakeWorld) -> None:
    """V1 can be switched off while an exit is open: the completion runs, later there is the empty table."""
    vm = left(world, "coco-v1")
    vm.vm.coco_mask = 0
    vm.answer_certs(0)
    assert vm.resumed(vm.run())
    assert len(vm.driver.issued) == 1
    vm.message(5)
    vm.memory.host_write(vm.DATA, b"\x33" * 4096)
    assert vm.resumed(vm.ask_run(ExitCode.EXT_GUEST_REQUEST, vm.REQUEST, vm.RESPONSE, rax=vm.DATA, rbx=1))
    assert vm.memory.host_read(vm.DATA, 25) == bytes(24) + b"\x33"


@pytest.mark.parametrize("profile", WITH_EXIT)
def test_two_vcpus_leave_at_once(world: MakeWorld, profile: str) -> None:
    """Exits of two vCPUs are independent: each has its own completion and its own `ret`."""
    one, two = left(world, profile), left(world, profile)
    one.answer_certs(TOO_SMALL[profile], 9)
    two.answer_certs(0)
    assert two.resumed(two.run())
    assert one.resumed(one.run())
    assert (one.reply, two.reply) == ((0, INVALID_LEN), (0, 0))
