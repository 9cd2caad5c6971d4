"""Guest requests without userspace. Source: GHCB 2.0; Linux, snp_handle_guest_req; the series."""

from __future__ import annotations

import errno
import struct
import threading
from typing import TYPE_CHECKING, cast

import pytest

from swsnp.abi.ghcb import ExitCode, GhcbField
from swsnp.abi.kvm import Ioctl, MpState
from swsnp.hardware import PageState, Vmgexit
from swsnp.hypervisor.psp_driver import DriverResult, PspDriver

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld, ScriptedDriver, ScriptedProcessor, World

PLAIN, EXTENDED = ExitCode.GUEST_REQUEST, ExitCode.EXT_GUEST_REQUEST
V1 = ["coco-v1", "coco-v1-revised"]
BOUNCE = ["linux-6.12", "linux-7.2"]
ALL = V1 + BOUNCE
GENERIC_V1, GENERIC = 0x8000000000000000, 0xFFFFFFFF00000000
REPORT, KEY = 5, 3


def send(vm: World, code: int = PLAIN, **registers: int) -> int:
    if code == EXTENDED:
        registers = {"rax": vm.DATA, "rbx": 4} | registers
    return vm.ask_run(code, vm.REQUEST, vm.RESPONSE, usage=0, unmarked=(), **registers)


# Checks before the handlers


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("code", [PLAIN, EXTENDED])
@pytest.mark.parametrize(
    ("request_gpa", "response_gpa"), [(0x3001, 0x4000), (0x3000, 0x4800), (0x3FFF, 0x3FFF)]
)
def test_misaligned(world: MakeWorld, profile: str, code: int, request_gpa: int, response_gpa: int) -> None:
    """Misaligned pages: V1 -EINVAL to the VMM; 6.12 info2=4; 7.2 info2=5. No firmware call."""
    vm = world(profile, enable=True)
    result = vm.ask_run(code, request_gpa, response_gpa, rax=vm.DATA, rbx=1)
    assert vm.driver.issued == []
    if profile in V1:
        assert result == -errno.EINVAL
        assert vm.resumed(vm.run())
        assert vm.reply == (0, 0)
    else:
        assert vm.resumed(result)
        assert vm.reply == (2, {"linux-6.12": 4, "linux-7.2": 5}[profile])


@pytest.mark.parametrize("code", [PLAIN, EXTENDED])
def test_equal_pages(world: MakeWorld, code: int) -> None:
    """Request and response page the same: 6.12 info2=4, 7.2 info2=5, V1 does not look."""
    for profile in ALL:
        vm = world(profile)
        vm.message(KEY)
        assert vm.resumed(vm.ask_run(code, vm.REQUEST, vm.REQUEST))
        wanted = {"linux-6.12": (2, 4), "linux-7.2": (2, 5)}.get(profile, (0, 0))
        assert vm.reply == wanted
        assert len(vm.driver.issued) == (profile in V1)


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("enable", [False, True])
@pytest.mark.parametrize("bad", ["rax unmarked", "rbx unmarked", "rax misaligned", "rax misaligned, rbx 0"])
def test_bad_cert_buffer(world: MakeWorld, profile: str, enable: bool, bad: str) -> None:
    """RAX or RBX not valid, RAX misaligned (also with RBX 0): V1 the generic error, else info1=2, info2=5."""
    vm = world(profile, enable=enable)
    vm.message(REPORT)
    unmarked = {"rax unmarked": (GhcbField.RAX,), "rbx unmarked": (GhcbField.RBX,)}.get(bad, ())
    rax = vm.DATA + 8 if "misaligned" in bad else vm.DATA
    rbx = 0 if "rbx 0" in bad else 4
    assert vm.resumed(
        vm.ask_run(EXTENDED, vm.REQUEST, vm.RESPONSE, unmarked=tuple(unmarked), rax=rax, rbx=rbx)
    )
    assert vm.reply == ((0, GENERIC_V1) if profile in V1 else (2, 5))
    assert vm.driver.issued == []


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("msg_type", [0, 1, KEY, 4, 6, 17, 255])
def test_only_reports_ask_for_certificates(world: MakeWorld, profile: str, msg_type: int) -> None:
    """Other messages never leave for certificates, need no RAX and RBX, and do not touch the data pages."""
    vm = world(profile, enable=True)
    vm.message(msg_type)
    vm.memory.host_write(vm.DATA, b"\x77" * 4096)
    assert vm.resumed(vm.ask_run(EXTENDED, vm.REQUEST, vm.RESPONSE))
    assert vm.reply == (0, 0)
    assert len(vm.driver.issued) == 1
    assert vm.memory.host_read(vm.DATA, 4096) == b"\x77" * 4096


@pytest.mark.parametrize("profile", ALL)
def test_report_as_plain_request(world: MakeWorld, profile: str) -> None:
    """A report request that comes as a plain guest request goes to the firmware, certificates or not."""
    vm = world(profile, enable=True)
    vm.message(REPORT)
    assert vm.resumed(send(vm))
    assert len(vm.driver.issued) == 1


@pytest.mark.parametrize("profile", ALL)
def test_type_byte_not_readable(world: MakeWorld, profile: str) -> None:
    """No memory at the request page: V1 the generic error to the guest, later -EIO to the VMM."""
    vm = world(profile)
    result = vm.ask_run(EXTENDED, vm.UNMAPPED, vm.RESPONSE, rax=vm.DATA, rbx=1)
    if profile in V1:
        assert vm.resumed(result)
        assert vm.reply == (0, GENERIC_V1)
    else:
        assert result == -errno.EIO


# The empty table


@pytest.mark.parametrize("profile", ALL)
def test_empty_table(world: MakeWorld, profile: str) -> None:
    """Without the exit: 24 zero bytes at RAX, then the request; the guest sees success."""
    vm = world(profile)
    vm.message(REPORT)
    vm.memory.host_write(vm.DATA, b"\x77" * 4096)
    assert vm.resumed(send(vm, EXTENDED, rbx=1))
    assert vm.memory.host_read(vm.DATA, 4096) == bytes(24) + b"\x77" * 4072
    assert vm.reply == (0, 0)
    assert vm.get(GhcbField.RBX) == 1
    assert vm.response() == vm.driver.fill


@pytest.mark.parametrize("profile", ALL)
def test_no_table_without_room(world: MakeWorld, profile: str) -> None:
    """RBX = 0: nothing is written, RAX may be anywhere; never INVALID_LEN."""
    vm = world(profile)
    vm.message(REPORT)
    vm.memory.host_write(vm.DATA, b"\x77" * 4096)
    assert vm.resumed(send(vm, EXTENDED, rbx=0))
    assert vm.memory.host_read(vm.DATA, 4096) == b"\x77" * 4096
    vm.message(REPORT)
    assert vm.resumed(send(vm, EXTENDED, rax=vm.UNMAPPED, rbx=0))
    assert vm.reply == (0, 0)
    assert len(vm.driver.issued) == 2


@pytest.mark.parametrize("profile", ALL)
@pytest.mark.parametrize("where", ["no memory", "read-only"])
def test_table_not_writable(world: MakeWorld, profile: str, where: str) -> None:
    """The table cannot be written: V1 the generic error, later -EIO to the VMM; no request."""
    vm = world(profile)
    vm.message(REPORT)
    vm.memory.read_only.add(vm.DATA // 4096)
    result = send(vm, EXTENDED, rax=vm.UNMAPPED if where == "no memory" else vm.DATA)
    assert vm.driver.issued == []
    if profile in V1:
        assert vm.resumed(result)
        assert vm.reply == (0, GENERIC_V1)
    else:
        assert result == -errno.EIO


# Bounce pages (6.12, 7.2)


@pytest.mark.parametrize("profile", BOUNCE)
def test_command(world: MakeWorld, profile: str) -> None:
    """SNP_GUEST_REQUEST (94h) gets the context and the VM's own pages, by the descriptor of LAUNCH_START."""
    vm = world(profile)
    message = vm.message(KEY)
    assert vm.resumed(send(vm))
    (issued,) = vm.driver.issued
    assert (issued.fd, issued.command, issued.gctx) == (vm.SEV_FD, 0x94, vm.GCTX)
    assert (issued.request, issued.response) == (vm.sev.request_page, vm.sev.response_page)
    assert issued.request_page == message
    assert vm.response() == vm.driver.fill
    assert vm.reply == (0, 0)


@pytest.mark.parametrize("profile", BOUNCE)
def test_request_page_missing(world: MakeWorld, profile: str) -> None:
    """The request page cannot be read: -EIO to the VMM, no firmware call."""
    vm = world(profile)
    assert vm.ask_run(PLAIN, vm.UNMAPPED, vm.RESPONSE) == -errno.EIO
    assert vm.driver.issued == []


@pytest.mark.parametrize("profile", BOUNCE)
@pytest.mark.parametrize("where", ["no memory", "read-only"])
def test_response_page_missing(world: MakeWorld, profile: str, where: str) -> None:
    """The response page cannot be written: -EIO to the VMM, after the firmware was called."""
    vm = world(profile)
    vm.memory.read_only.add(vm.RESPONSE // 4096)
    response = vm.UNMAPPED if where == "no memory" else vm.RESPONSE
    assert vm.ask_run(PLAIN, vm.REQUEST, response) == -errno.EIO
    assert len(vm.driver.issued) == 1
    assert not vm.sev.request_mutex.locked()


@pytest.mark.parametrize("profile", BOUNCE)
@pytest.mark.parametrize("status", [0x16, 0x1D, 0x27])
def test_firmware_status(world: MakeWorld, profile: str, status: int) -> None:
    """A firmware status: the guest resumes with it, and the response page is overwritten all the same."""
    vm = world(profile)
    vm.message(KEY)
    assert vm.resumed(send(vm))
    vm.memory.host_write(vm.RESPONSE, b"\x22" * 4096)
    vm.driver.results.append(DriverResult(-errno.EIO, status))
    assert vm.resumed(send(vm))
    assert vm.reply == (0, status)
    assert vm.response() == vm.driver.fill, "what the VM's page held before"


@pytest.mark.parametrize("profile", BOUNCE)
@pytest.mark.parametrize("code", [PLAIN, EXTENDED])
@pytest.mark.parametrize("error", [errno.ENODEV, errno.EBUSY, errno.ETIMEDOUT])
def test_driver_error(world: MakeWorld, profile: str, code: int, error: int) -> None:
    """A driver error without firmware status is KVM_RUN's result; nothing is written to the guest."""
    vm = world(profile)
    vm.message(REPORT)
    vm.driver.results.append(DriverResult(-error, 0))
    assert send(vm, code) == -error
    assert vm.response() == bytes(4096)
    assert not vm.sev.request_mutex.locked()


@pytest.mark.parametrize("profile", BOUNCE)
def test_descriptor_closed(world: MakeWorld, profile: str) -> None:
    """The VMM closed /dev/sev: the number is looked up at each request: -EBADF."""
    vm = world(profile)
    vm.sev.sev_fd = 9
    assert send(vm) == -errno.EBADF


@pytest.mark.parametrize("profile", ALL)
def test_not_launched(world: MakeWorld, profile: str) -> None:
    """Without a guest context there is nothing to send: -EINVAL."""
    vm = world(profile)
    vm.sev.gctx = None
    assert send(vm) == -errno.EINVAL
    assert vm.driver.issued == []


class WatchedLock:
    """A lock that tells when a second thread comes to it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.comers = 0
        self.second = threading.Event()

    def __enter__(self) -> None:
        self.comers += 1
        if self.comers == 2:
            self.second.set()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


@pytest.mark.parametrize("profile", BOUNCE)
def test_one_request_per_vm(world: MakeWorld, profile: str) -> None:
    """While one vCPU's request is with the firmware, another's of the same VM waits for it."""
    vm = world(profile)
    mutex = WatchedLock()
    vm.sev.request_mutex = cast("threading.Lock", mutex)
    ghcbs, pages = {0: 0x10000, 1: 0x11000}, {0: (0x8000, 0x9000), 1: (0xA000, 0xB000)}
    vcpus = {0: vm.vcpu, 1: vm.add_vcpu(1)}
    vcpus[1].mp_state = MpState.RUNNABLE
    for number, vcpu in vcpus.items():
        page = vm.memory.host_view(ghcbs[number], 4096)
        struct.pack_into("<QQQ", page, 0x390, PLAIN, *pages[number])
        page[0x3FE] = 0x1C
        vm.memory.host_write(pages[number][0], bytes([number + 1]) * 4096)
        vcpu.registered_ghcb = vcpu.processor.ghcb_msr = ghcbs[number]
        cast("ScriptedProcessor", vcpu.processor).exits.append(Vmgexit())
    threads = {
        number: threading.Thread(target=vcpu.ioctl, args=(Ioctl.KVM_RUN, 0)) for number, vcpu in vcpus.items()
    }
    seen_while_first: list[int] = []

    def firmware() -> None:
        if len(vm.driver.issued) == 1:
            threads[1].start()
            mutex.second.wait(10)
            seen_while_first.append(len(vm.driver.issued))
        vm.driver.fill = vm.driver.issued[-1].request_page

    vm.driver.during = firmware
    threads[0].start()
    threads[0].join(20)
    threads[1].join(20)
    assert mutex.second.is_set()
    assert seen_while_first == [1]
    assert len(vm.driver.issued) == 2
    for number, (_, response) in pages.items():
        assert vm.memory.host_read(response, 4096) == bytes([number + 1]) * 4096


def test_two_vms_have_their_own_pages(world: MakeWorld) -> None:
    """Two VMs do not share bounce pages: a failing request of one shows nothing of the other."""
    one = world()
    two = world(system=one.system)
    two.driver = two.vm.driver
    one.message(KEY)
    one.driver.fill = b"\x01" * 4096
    assert one.resumed(send(one))
    two.driver.results.append(DriverResult(-errno.EIO, 0x16))
    assert two.resumed(send(two))
    assert two.response() == bytes(4096)
    assert one.driver.issued[0].response != two.driver.issued[0].response


class SilentProcessor:
    """A secure processor that never answers."""

    def command(self, command: int, buffer: int) -> int:
        raise TimeoutError


@pytest.mark.parametrize("profile", BOUNCE)
def test_timeout_is_for_all(world: MakeWorld, profile: str) -> None:
    """The processor does not answer: -ETIMEDOUT once, then -EBUSY for every VM of the host."""
    one = world(profile)
    two = world(profile, system=one.system)
    driver = PspDriver(SilentProcessor(), memory=one.system, rmp=one.rmp)
    one.vm.driver = two.vm.driver = cast("ScriptedDriver", driver)
    assert send(one) == -errno.ETIMEDOUT
    assert send(one) == -errno.EBUSY
    assert send(two) == -errno.EBUSY


# The guest's own pages (the series)


@pytest.mark.parametrize("profile", V1)
def test_v1_command(world: MakeWorld, profile: str) -> None:
    """V1: the firmware gets the guest's pages; the response page is the firmware's meanwhile."""
    vm = world(profile)
    message = vm.message(KEY)
    response = vm.memory.host_page_address(vm.RESPONSE)
    states: list[PageState] = []
    vm.driver.during = lambda: states.append(vm.rmp.state(response))
    assert vm.resumed(send(vm))
    (issued,) = vm.driver.issued
    assert (issued.request, issued.response) == (vm.memory.host_page_address(vm.REQUEST), response)
    assert issued.request_page == message
    assert states == [PageState.FIRMWARE]
    assert vm.rmp.state(response) is PageState.HYPERVISOR
    assert vm.driver.reclaimed == [response]
    assert vm.reply == (0, 0)
    assert vm.response() == vm.driver.fill


@pytest.mark.parametrize("profile", V1)
def test_v1_no_request_page(world: MakeWorld, profile: str) -> None:
    """V1: no host page for the request: -EINVAL to the VMM."""
    vm = world(profile)
    assert vm.ask_run(PLAIN, vm.UNMAPPED, vm.RESPONSE) == -errno.EINVAL


@pytest.mark.parametrize("profile", V1)
def test_v1_false_success(world: MakeWorld, profile: str) -> None:
    """V1: no host page for the response: a positive EINVAL resumes the guest, which sees success."""
    vm = world(profile)
    assert vm.resumed(vm.ask_run(PLAIN, vm.REQUEST, vm.UNMAPPED))
    assert vm.reply == (0, 0)
    assert vm.driver.issued == []


@pytest.mark.parametrize("profile", V1)
def test_v1_second_request_on_the_same_page(world: MakeWorld, profile: str) -> None:
    """V1: a response page that is the firmware's already fails in RMPUPDATE: -EINVAL to the VMM."""
    vm = world(profile)
    vm.driver.make_firmware(vm.memory.host_page_address(vm.RESPONSE))
    assert send(vm) == -errno.EINVAL
    assert vm.driver.issued == []


@pytest.mark.parametrize(("ret", "fw"), [(-errno.EIO, 0x16), (-errno.EBUSY, 0), (-errno.ETIMEDOUT, 0)])
def test_v1_error(world: MakeWorld, ret: int, fw: int) -> None:
    """V1: every error goes to the VMM at once, and the response page stays with the firmware."""
    vm = world("coco-v1")
    vm.driver.results.append(DriverResult(ret, fw))
    assert send(vm) == ret
    assert vm.rmp.state(vm.memory.host_page_address(vm.RESPONSE)) is PageState.FIRMWARE
    assert vm.driver.reclaimed == []
    assert send(vm) == -errno.EINVAL, "the page can never be used again"


@pytest.mark.parametrize(
    ("ret", "fw", "info2"),
    [(-errno.EIO, 0x16, 0x8000000000000016), (-errno.EBUSY, 0, GENERIC_V1), (0, 0, 0)],
)
def test_v1_revised_error(world: MakeWorld, ret: int, fw: int, info2: int) -> None:
    """V1 revised: errors go to the guest under the generic code, the page is always taken back."""
    vm = world("coco-v1-revised")
    vm.driver.results.append(DriverResult(ret, fw))
    assert vm.resumed(send(vm))
    assert vm.reply == (0, info2)
    assert vm.rmp.state(vm.memory.host_page_address(vm.RESPONSE)) is PageState.HYPERVISOR


@pytest.mark.parametrize("profile", V1)
def test_v1_reclaim_fails(world: MakeWorld, profile: str) -> None:
    """V1: the page cannot be taken back: -EIO to the VMM, the page is leaked."""
    vm = world(profile)
    vm.driver.reclaim_result = -errno.EIO
    assert send(vm) == -errno.EIO
    assert vm.rmp.state(vm.memory.host_page_address(vm.RESPONSE)) is PageState.FIRMWARE
