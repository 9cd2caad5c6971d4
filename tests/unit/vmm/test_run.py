"""The run loop against a scripted KVM: every row of the certificate protocol, page states, and the ends."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import Capability, MpState
from swsnp.certs.ofd_lock import try_lock
from swsnp.errors import UsageError
from swsnp.trace import CertsRead, PageStateChange, Trace, TraceEvent
from swsnp.vmm.certs import Blob, BlobFile, BytesSource, Failed, Retry, TooLarge, exclusive_lock
from swsnp.vmm.config import VmConfig
from swsnp.vmm.launch import RunningVm, launch
from swsnp.vmm.stop import (
    EntryFailed,
    GuestShutdown,
    Idle,
    InternalError,
    RunFailed,
    Terminated,
    UnhandledExit,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.unit.vmm.conftest import Clock
    from tests.unit.vmm.fake_host import FakeHost

    from swsnp.vmm.certs import Acquired, CertificateSource

GPA = 0x40_0000
MEMORY = 16 << 20
EHWPOISON = 133
IDLE = Idle(MpState.HALTED)


def start(
    host: FakeHost,
    certs: CertificateSource | None = None,
    *,
    dialect: str = "linux-7.2",
    vcpus: int = 1,
    trace: Trace | None = None,
) -> RunningVm:
    if dialect.startswith("coco"):
        host.extensions[Capability.EXIT_COCO] = 1
    config = VmConfig(name="vm", memory_size=MEMORY, vcpus=vcpus, certs=certs)
    return launch(host, config, (), dialect=dialect, trace=trace)


def put(area: memoryview, reason: int, layout: str = "", *values: int) -> None:
    struct.pack_into("<I", area, 8, reason)
    struct.pack_into(f"<{layout}", area, 32, *values)


def wants_certs(npages: int, *, dialect: str = "linux-7.2", gpa: int = GPA) -> Callable[[memoryview], int]:
    """KVM_RUN that leaves for certificates."""

    def run(area: memoryview) -> int:
        if dialect == "linux-7.2":
            put(area, 43, "QQQ", gpa, npages, 0)
        else:
            put(area, 40, "B7xQII", 0, gpa >> 12, npages, 0)
        return 0

    return run


def returns(result: int, then: Callable[[], object] = lambda: None) -> Callable[[memoryview], int]:
    def run(_: memoryview) -> int:
        then()
        return result

    return run


def union(host: FakeHost, vcpu: int = 0, size: int = 24) -> bytes:
    """The start of the exit union as it is now."""
    return next(bytes(area[32 : 32 + size]) for number, area in host.vcpus.values() if number == vcpu)


def immediate_exit(host: FakeHost, vcpu: int = 0) -> int:
    return next(area[1] for number, area in host.vcpus.values() if number == vcpu)


class OneAnswer:
    """A source whose releases are counted."""

    name = "one"

    def __init__(self, answer: Acquired | None = None) -> None:
        self.rooms: list[int] = []
        self.waits: list[float] = []
        self.released = 0
        self._answer = answer or Blob(b"table", self._release)

    def _release(self) -> None:
        self.released += 1

    def acquire(self, room: int, *, least_wait_s: float = 0.0) -> Acquired:
        self.rooms.append(room)
        self.waits.append(least_wait_s)
        return self._answer


@pytest.fixture
def trace_events() -> Iterator[tuple[Trace, list[TraceEvent]]]:
    trace, events = Trace(), list[TraceEvent]()
    with trace.listen(events.append):
        yield trace, events


# --- plain running


def test_plain_request_is_one_run(host: FakeHost) -> None:
    """KVM_RUN ends with -EINTR and the guest is halted: the loop comes back at once."""
    vm = start(host)
    before = list(host.steps)
    assert vm.run() == IDLE
    assert host.immediate_exits == [0]
    assert host.steps == before


@pytest.mark.parametrize("result", [-errno.EINTR, -errno.EAGAIN])
def test_interrupted_and_runnable_goes_on(host: FakeHost, result: int) -> None:
    """QEMU: after -EINTR and -EAGAIN immediate_exit is cleared and the vCPU runs on, unless it waits."""
    vm = start(host)

    def interrupted(area: memoryview) -> int:
        area[1] = 1  # somebody kicked the vCPU
        host.mp_states[0] = MpState.RUNNABLE
        return result

    def idle(area: memoryview) -> int:
        assert area[1] == 0
        host.mp_states[0] = MpState.HALTED
        return -errno.EINTR

    host.runs[0] = [interrupted, idle]
    assert vm.run() == IDLE
    assert len(host.immediate_exits) == 2


def test_waiting_for_start_is_idle_too(host: FakeHost) -> None:
    """KVM_MP_STATE_UNINITIALIZED: a vCPU that nobody started has nothing to do; looping would never end."""
    vm = start(host)
    host.mp_states[0] = MpState.UNINITIALIZED
    host.runs[0] = [returns(-errno.EAGAIN)]
    assert vm.run() == Idle(MpState.UNINITIALIZED)


def test_mp_state_that_cannot_be_read(host: FakeHost) -> None:
    """A dead VM answers -EIO to everything; the loop ends."""
    vm = start(host)
    host.answers["KVM_GET_MP_STATE"] = -errno.EIO
    assert vm.run() == RunFailed(errno.EIO, "KVM_GET_MP_STATE: -EIO")


def test_stale_exit_reason_is_not_dispatched(host: FakeHost) -> None:
    """KVM_RUN: exit_reason is not changed when it returns -EINTR; it still shows the certificate exit."""
    source = OneAnswer()
    vm = start(host, source)
    host.runs[0] = [wants_certs(4), returns(-errno.EINTR), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert len(source.rooms) == 1


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EBADF, "/dev/sev"),
        (errno.EBUSY, "given up after an earlier timeout"),
        (errno.ETIMEDOUT, "did not answer"),
        (errno.EIO, "the VM is dead"),
        (errno.EINVAL, "refused a completion"),
        (errno.EFAULT, "memory that is not there"),
    ],
)
def test_errors_stop_the_vm(host: FakeHost, number: int, hint: str) -> None:
    """Any other error of KVM_RUN stops the VM; the text names the errno and where to look."""
    vm = start(host)
    host.runs[0] = [returns(-number)]
    stop = vm.run()
    assert isinstance(stop, RunFailed)
    assert stop.errno == number
    assert f"-{errno.errorcode[number]}" in stop.detail
    assert hint in stop.detail


# --- certificates: the protocol, row by row


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("linux-7.2", "000040000000000004000000000000000000000000000000"),
        ("coco-v1", "000000000000000000040000000000000400000000000000"),
        ("coco-v1-revised", "000000000000000000040000000000000400000000000000"),
    ],
)
def test_blob_is_delivered(host: FakeHost, dialect: str, expected: str) -> None:
    """Room enough: the blob is in guest memory, ret is 0, and KVM_RUN is called with immediate_exit."""
    vm = start(host, BytesSource(b"opaque \x00\xff table"), dialect=dialect)
    host.runs[0] = [wants_certs(4, dialect=dialect), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert vm.read(GPA, 16) == b"opaque \x00\xff table" + bytes(1)
    assert union(host).hex() == expected
    assert host.immediate_exits == [0, 1, 0]
    assert immediate_exit(host) == 0


@pytest.mark.parametrize(
    ("dialect", "expected"),
    [
        ("linux-7.2", "000040000000000003000000000000001c00000000000000"),
        ("coco-v1", "000000000000000000040000000000000300000001000000"),
    ],
)
@pytest.mark.parametrize("npages", [0, 1, 2])
def test_too_small(host: FakeHost, dialect: str, expected: str, npages: int) -> None:
    """Too few pages: npages becomes the needed count, ret is ENOSPC or 1, and nothing is written or held."""
    source = BytesSource(b"x" * (2 * 4096 + 1))
    vm = start(host, source, dialect=dialect)
    host.runs[0] = [wants_certs(npages, dialect=dialect), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert union(host).hex() == expected
    assert vm.read(GPA, 3 * 4096) == bytes(3 * 4096)
    assert host.immediate_exits == [0, 0], "the firmware is not called, so nothing has to be waited for"


@pytest.mark.parametrize("npages", [2, 3, 1 << 40])
def test_exactly_enough_and_more(host: FakeHost, npages: int) -> None:
    """Need = ceil(size / 4096): two whole pages fit two; more room is not written to."""
    vm = start(host, BytesSource(b"x" * (2 * 4096)))
    host.runs[0] = [wants_certs(npages), returns(-errno.EINTR)]
    vm.write(GPA + 2 * 4096, b"guest")
    assert vm.run() == IDLE
    assert vm.read(GPA + 4096, 4096 + 5) == b"x" * 4096 + b"guest"
    assert union(host)[16:] == bytes(8)


def test_empty_blob_needs_no_room(host: FakeHost) -> None:
    """A blob of size 0 fits in 0 pages: ret 0, nothing written, even where the guest named no memory."""
    vm = start(host, BytesSource(b""))
    host.runs[0] = [wants_certs(0, gpa=1 << 50), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert union(host)[16:] == bytes(8)
    assert host.immediate_exits == [0, 1, 0]


@pytest.mark.parametrize(
    ("answer", "dialect", "expected", "wait"),
    [
        (Retry("busy"), "linux-7.2", "0b00000000000000", 0.0),
        (Failed("gone"), "linux-7.2", "0500000000000000", 0.0),
        (Retry("busy"), "coco-v1", "0400000000000080", 2.0),
        (Failed("gone"), "coco-v1", "0400000000000080", 2.0),
        (TooLarge(1 << 50), "coco-v1", "0400000000000080", 2.0),
    ],
)
def test_no_certificates(host: FakeHost, answer: Acquired, dialect: str, expected: str, wait: float) -> None:
    """EAGAIN and EIO upstream; the series cannot say "later": it waits longer, then 1 << 31."""
    source = OneAnswer(answer)
    vm = start(host, source, dialect=dialect)
    host.runs[0] = [wants_certs(4, dialect=dialect), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert union(host)[16:].hex() == expected
    assert source.waits == [wait]
    assert host.immediate_exits == [0, 0]


@pytest.mark.parametrize("gpa", [MEMORY, MEMORY - 4096, (1 << 64) - 4096])
def test_buffer_without_memory(host: FakeHost, gpa: int) -> None:
    """KVM promises only an aligned address: no memory there, or too little, is EIO; the lock goes."""
    source = OneAnswer()
    source._answer = Blob(b"x" * 4097, source._release)
    vm = start(host, source)
    vm.write(MEMORY - 4096, b"guest")
    host.runs[0] = [wants_certs(4, gpa=gpa), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert union(host)[16:].hex() == "0500000000000000"
    assert source.released == 1
    assert vm.read(MEMORY - 4096, 5) == b"guest"


def test_the_same_trouble_is_logged_once(host: FakeHost, caplog: pytest.LogCaptureFixture) -> None:
    """A guest can ask for ever: a failure that stays the same must not fill the host's log."""
    vm = start(host, OneAnswer(Failed("no such file")))
    host.runs[0] = [*(wants_certs(4) for _ in range(5)), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert [each.getMessage() for each in caplog.records] == [
        "vm: no certificates for the guest: no such file"
    ]


def test_lock_is_held_while_the_firmware_works(host: FakeHost, tmp_path: Path) -> None:
    """The race of update and report: an updater cannot get in between the fetch and the signature."""
    path = tmp_path / "blob"
    path.write_bytes(b"certs")
    seen: list[bool] = []
    vm = start(host, BlobFile(path))
    host.runs[0] = [
        wants_certs(1),
        returns(-errno.EINTR, lambda: seen.append(writer_gets_in(path))),
        returns(-errno.EINTR, lambda: seen.append(writer_gets_in(path))),
    ]
    assert vm.run() == IDLE
    assert seen == [False, True]


def writer_gets_in(path: Path) -> bool:
    fd = os.open(path, os.O_RDWR)
    try:
        return try_lock(fd, fcntl.F_WRLCK)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.EBADF, errno.EBUSY, errno.EINVAL, errno.ETIMEDOUT, errno.EAGAIN, errno.EFAULT]
)
def test_lock_goes_whatever_the_completion_returned(host: FakeHost, tmp_path: Path, number: int) -> None:
    """A completion that fails stops the VM; the lock is dropped and immediate_exit is clear all the same."""
    path = tmp_path / "blob"
    path.write_bytes(b"certs")
    vm = start(host, BlobFile(path))
    host.runs[0] = [wants_certs(1), returns(-number)]
    stop = vm.run()
    assert isinstance(stop, RunFailed)
    assert stop.errno == number
    assert writer_gets_in(path)
    assert immediate_exit(host) == 0
    assert len(host.immediate_exits) == 2, "KVM_RUN must not be called again: the guest would see success"


def test_lock_goes_when_the_host_breaks_down(host: FakeHost) -> None:
    """An exception out of KVM_RUN (a bug of the model) leaves no lock and no immediate_exit behind."""
    source = OneAnswer()
    vm = start(host, source)

    def break_down(_: memoryview) -> int:
        raise RuntimeError("model")

    host.runs[0] = [wants_certs(1), break_down]
    with pytest.raises(RuntimeError):
        vm.run()
    assert source.released == 1
    assert immediate_exit(host) == 0


def test_lock_goes_when_a_listener_breaks_down(host: FakeHost) -> None:
    """An exception between reading the blob and KVM_RUN (here a trace listener's) leaves no lock behind."""
    source, trace = OneAnswer(), Trace()
    vm = start(host, source, trace=trace)
    host.runs[0] = [wants_certs(1)]

    def listener(_: TraceEvent) -> None:
        raise RuntimeError("listener")

    with trace.listen(listener), pytest.raises(RuntimeError):
        vm.run()
    assert source.released == 1


def test_new_exit_of_a_completion_is_dispatched(host: FakeHost) -> None:
    """KVM_RUN with immediate_exit may return 0 with another exit: it is handled, after the lock has gone."""
    source = OneAnswer()
    vm = start(host, source)

    def shut_down(area: memoryview) -> int:
        put(area, 8)
        return 0

    host.runs[0] = [wants_certs(1), shut_down]
    assert vm.run() == GuestShutdown()
    assert source.released == 1


def test_certificate_exit_after_certificate_exit(host: FakeHost) -> None:
    """A completion that asks again is served again, each time with a blob of its own."""
    source = OneAnswer()
    vm = start(host, source)
    host.runs[0] = [wants_certs(1), wants_certs(2), wants_certs(3), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert source.rooms == [4096, 8192, 12288]
    assert source.released == 3
    assert host.immediate_exits == [0, 1, 1, 1, 0]


def test_two_vcpus_hold_their_own_locks(host: FakeHost, tmp_path: Path) -> None:
    """Two vCPUs with certificate exits at the same time: the first to end does not drop the second's lock."""
    path = tmp_path / "blob"
    path.write_bytes(b"certs")
    vm = start(host, BlobFile(path), vcpus=2)
    seen: list[tuple[str, bool]] = []

    def completion_of_first(_: memoryview) -> int:
        host.runs[1] = [
            wants_certs(1, gpa=GPA + 4096),
            returns(-errno.EINTR, lambda: seen.append(("both", writer_gets_in(path)))),
        ]
        assert vm.run(1) == IDLE
        seen.append(("second ended", writer_gets_in(path)))
        return -errno.EINTR

    host.runs[0] = [wants_certs(1), completion_of_first]
    assert vm.run(0) == IDLE
    seen.append(("both ended", writer_gets_in(path)))
    assert seen == [("both", False), ("second ended", False), ("both ended", True)]
    assert vm.read(GPA, 5) == vm.read(GPA + 4096, 5) == b"certs"


def test_an_update_does_not_stall_another_vm(host: FakeHost, tmp_path: Path, clock: Clock) -> None:
    """Each VM has its own blob: an updater that holds one VM's file costs the other VM nothing."""
    (tmp_path / "a").write_bytes(b"a")
    (tmp_path / "b").write_bytes(b"b")
    waiting = BlobFile(tmp_path / "a", sleep=clock.sleep, monotonic=clock.monotonic)
    first, second = start(host, waiting), start(host, BlobFile(tmp_path / "b"))
    ended: list[object] = []

    def serve_second() -> None:
        # the fake's vCPUs of both VMs are number 0, so they share the script
        host.runs[0][:0] = [wants_certs(1), returns(-errno.EINTR)]
        ended.append(second.run())

    clock.at_sleep = [serve_second]
    host.runs[0] = [wants_certs(1), returns(-errno.EINTR)]
    with exclusive_lock(tmp_path / "a"):
        assert first.run() == IDLE
    assert ended == [IDLE]
    assert second.read(GPA, 1) == b"b"


def test_growing_blob_is_told_again(host: FakeHost, tmp_path: Path) -> None:
    """A blob that grows between two attempts: the second attempt is told the new size."""
    path = tmp_path / "blob"
    path.write_bytes(bytes(4097))
    vm = start(host, BlobFile(path))
    needed: list[int] = []

    def note(area: memoryview) -> int:
        needed.append(int.from_bytes(area[40:48], "little"))
        path.write_bytes(bytes(2 * 4096 + 1))
        return wants_certs(2)(area)

    host.runs[0] = [wants_certs(1), note, note, returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert needed == [2, 3]


def test_without_a_source_the_exit_is_not_ours(host: FakeHost) -> None:
    """A VM without certificates never enabled the exit; should it come all the same, the VM stops."""
    vm = start(host)
    host.runs[0] = [wants_certs(4)]
    assert vm.run() == UnhandledExit(43, "exit 43 (SNP_REQ_CERTS)")


def test_the_other_generations_exit_is_not_ours(host: FakeHost) -> None:
    """Exit 40 is something else upstream (TDX): it is never taken for a certificate request."""
    source = OneAnswer()
    vm = start(host, source)
    host.runs[0] = [wants_certs(4, dialect="coco-v1")]
    assert vm.run() == UnhandledExit(40, "exit 40 (COCO)")
    assert source.rooms == []


def test_another_sub_type_of_the_series(host: FakeHost) -> None:
    """KVM_EXIT_COCO with an nr that this VMM did not enable stops the VM."""
    source = OneAnswer()
    vm = start(host, source, dialect="coco-v1")

    def other(area: memoryview) -> int:
        put(area, 40, "B", 1)
        return 0

    host.runs[0] = [other]
    assert vm.run() == UnhandledExit(40, "exit 40 (COCO)")
    assert source.rooms == []


@pytest.mark.parametrize(
    ("answer", "npages", "size", "ret"),
    [(None, 4, 5, 0), (TooLarge(9000), 3, 9000, 28), (Retry("busy"), 4, 0, 11), (Failed("gone"), 4, 0, 5)],
)
def test_trace_of_certificates(
    host: FakeHost,
    trace_events: tuple[Trace, list[TraceEvent]],
    answer: Acquired | None,
    npages: int,
    size: int,
    ret: int,
) -> None:
    """`CertsRead` shows what went into kvm_run."""
    trace, events = trace_events
    vm = start(host, OneAnswer(answer), trace=trace)
    host.runs[0] = [wants_certs(4), returns(-errno.EINTR)]
    assert vm.run() == IDLE
    assert events == [CertsRead(vm="vm", vcpu=0, source="one", size=size, npages=npages, ret=ret)]


# --- page states


def hypercall(gpa: int, npages: int, attributes: int, nr: int = 12) -> Callable[[memoryview], int]:
    def run(area: memoryview) -> int:
        put(area, 3, "Q6QQ", nr, gpa, npages, attributes, 0, 0, 0, 0xDEAD)
        return 0

    return run


def hypercall_ret(host: FakeHost) -> int:
    return int.from_bytes(union(host, size=64)[56:], "little")


@pytest.mark.parametrize("size_hint", [0, 1])
def test_to_shared(host: FakeHost, trace_events: tuple[Trace, list[TraceEvent]], size_hint: int) -> None:
    """KVM_HC_MAP_GPA_RANGE: attributes cleared, then the guest_memfd's pages are thrown away; ret is 0."""
    trace, events = trace_events
    vm = start(host, trace=trace)
    host.conversions.clear()
    host.runs[0] = [hypercall(GPA, 2, size_hint)]
    assert vm.run() == IDLE
    assert host.conversions == [(GPA, 8192, 0)]
    [(where, offset, size)] = host.discarded
    assert where.startswith("memfd ")
    assert (offset, size) == (GPA, 8192)
    assert hypercall_ret(host) == 0
    assert events == [PageStateChange(vm="vm", gpa=GPA, npages=2, private=False)]


def test_to_private(host: FakeHost, trace_events: tuple[Trace, list[TraceEvent]]) -> None:
    """KVM_HC_MAP_GPA_RANGE with the encrypted bit: attributes set, then the shared mapping's pages go."""
    trace, events = trace_events
    vm = start(host, trace=trace)
    host.conversions.clear()
    base = next(address for address, content in host.memory.items() if len(content) == MEMORY)
    host.runs[0] = [hypercall(GPA, 512, 0x11)]
    assert vm.run() == IDLE
    assert host.conversions == [(GPA, 512 * 4096, 8)]
    assert host.discarded == [("shared", base + GPA, 512 * 4096)]
    assert events == [PageStateChange(vm="vm", gpa=GPA, npages=512, private=True)]


@pytest.mark.parametrize(
    ("gpa", "npages", "attributes", "expected"),
    [
        (GPA + 1, 1, 0x10, errno.EINVAL),
        (GPA, 0, 0x10, errno.EINVAL),
        (MEMORY, 1, 0x10, errno.EINVAL),
        (MEMORY - 4096, 2, 0x10, errno.EINVAL),
        (MEMORY - 4096, 2, 0x00, errno.EINVAL),
        (1 << 63, 1 << 52, 0x10, errno.EINVAL),
        (MEMORY, 1, 0x00, 0),
    ],
)
def test_ranges_that_are_not_memory(
    host: FakeHost, gpa: int, npages: int, attributes: int, expected: int
) -> None:
    """QEMU: misaligned, empty, partly or not in memory is refused; no memory to shared is accepted."""
    vm = start(host)
    host.conversions.clear()
    host.runs[0] = [hypercall(gpa, npages, attributes)]
    assert vm.run() == IDLE
    assert hypercall_ret(host) == expected
    assert host.conversions == []
    assert host.discarded == []


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EAGAIN])
def test_kvm_refuses_the_attributes(host: FakeHost, number: int) -> None:
    """KVM takes EINVAL and EAGAIN, positive, as answers to the guest; nothing is thrown away then."""
    vm = start(host)
    host.answers["KVM_SET_MEMORY_ATTRIBUTES"] = -number
    host.runs[0] = [hypercall(GPA, 1, 0x10)]
    assert vm.run() == IDLE
    assert hypercall_ret(host) == number
    assert host.discarded == []


@pytest.mark.parametrize(
    ("step", "attributes"),
    [("KVM_SET_MEMORY_ATTRIBUTES", 0x10), ("discard", 0x10), ("discard_memfd", 0x00)],
)
def test_conversion_that_breaks(host: FakeHost, step: str, attributes: int) -> None:
    """A host that cannot convert is not the guest's fault: the VM stops, and ret stays unwritten."""
    vm = start(host)
    host.answers[step] = -errno.ENOMEM
    host.runs[0] = [hypercall(GPA, 1, attributes)]
    stop = vm.run()
    assert isinstance(stop, RunFailed)
    assert stop.errno == errno.ENOMEM
    assert "page state change of 1 pages at 0x400000" in stop.detail
    assert hypercall_ret(host) == 0xDEAD


def test_unknown_hypercall(host: FakeHost) -> None:
    """Only KVM_HC_MAP_GPA_RANGE was enabled."""
    vm = start(host)
    host.runs[0] = [hypercall(GPA, 1, 0, nr=13)]
    assert vm.run() == UnhandledExit(3, "hypercall 13, wanted 12")


def memory_fault(
    flags: int, gpa: int, size: int = 4096, number: int = errno.EFAULT
) -> Callable[[memoryview], int]:
    def run(area: memoryview) -> int:
        put(area, 39, "QQQ", flags, gpa, size)
        return -number

    return run


@pytest.mark.parametrize(("flags", "attributes"), [(8, 8), (0, 0)])
def test_implicit_conversion(host: FakeHost, flags: int, attributes: int) -> None:
    """KVM_EXIT_MEMORY_FAULT with -EFAULT: the page gets the state that the access assumed."""
    vm = start(host)
    host.conversions.clear()
    host.runs[0] = [memory_fault(flags, GPA)]
    assert vm.run() == IDLE
    assert host.conversions == [(GPA, 4096, attributes)]
    assert len(host.discarded) == 1


@pytest.mark.parametrize(
    ("fault", "number", "text"),
    [
        (memory_fault(4, GPA), errno.EFAULT, "unknown flags 0x4"),
        (memory_fault(12, GPA), errno.EFAULT, "unknown flags 0xc"),
        (memory_fault(8, GPA, 100), errno.EFAULT, "not in pages"),
        (memory_fault(8, MEMORY), errno.EFAULT, "private access to 4096 bytes at 0x1000000: no memory there"),
        (memory_fault(0, MEMORY), errno.EFAULT, "shared access to 4096 bytes at 0x1000000: no memory there"),
        (memory_fault(8, GPA, number=EHWPOISON), EHWPOISON, "KVM_RUN: -EHWPOISON"),
        (memory_fault(8, GPA, number=errno.EIO), errno.EIO, "-EIO"),
    ],
)
def test_memory_faults_that_stop(
    host: FakeHost, fault: Callable[[memoryview], int], number: int, text: str
) -> None:
    """Unknown flags, no memory, poison: converting would not help. Other errors never look at exit_reason."""
    vm = start(host)
    host.conversions.clear()
    host.runs[0] = [fault]
    stop = vm.run()
    assert isinstance(stop, RunFailed)
    assert stop.errno == number
    assert text in stop.detail
    assert host.conversions == []


def test_memory_fault_that_may_be_tried_again(host: FakeHost) -> None:
    """-EAGAIN from the conversion: the access faults again and is converted then; a broken host stops."""
    vm = start(host)
    host.answers["KVM_SET_MEMORY_ATTRIBUTES"] = [-errno.EAGAIN, 0, -errno.ENOMEM]
    host.runs[0] = [memory_fault(8, GPA), memory_fault(8, GPA), memory_fault(8, GPA)]
    assert vm.run() == RunFailed(
        errno.ENOMEM, "private access to 4096 bytes at 0x400000: KVM_SET_MEMORY_ATTRIBUTES"
    )


# --- the end


def system_event(kind: int, ndata: int, value: int) -> Callable[[memoryview], int]:
    def run(area: memoryview) -> int:
        put(area, 24, "IIQ", kind, ndata, value)
        return 0

    return run


def test_termination_by_msr(host: FakeHost) -> None:
    """GHCB MSR protocol: set in bits 15:12, code in bits 23:16."""
    vm = start(host)
    host.runs[0] = [system_event(6, 1, 0x03_1100)]
    assert vm.run() == Terminated(1, 3, 0x03_1100)


def test_termination_by_event(host: FakeHost) -> None:
    """TERM_REQUEST: the MSR holds the GHCB's address, and KVM has written its reply over the reason."""
    vm = start(host)
    vm.write(GPA + 0x398, (0x421).to_bytes(8, "little"))
    host.runs[0] = [system_event(6, 1, GPA)]
    assert vm.run() == Terminated(None, None, GPA)


@pytest.mark.parametrize("msr", [MEMORY, GPA | 0x006])
def test_termination_without_a_reason(host: FakeHost, msr: int) -> None:
    """Whatever else the MSR holds does not tell the reason."""
    vm = start(host)
    host.runs[0] = [system_event(6, 1, msr)]
    assert vm.run() == Terminated(None, None, msr)


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (system_event(6, 0, 0), UnhandledExit(24, "SEV_TERM without the GHCB MSR")),
        (system_event(1, 1, 7), UnhandledExit(24, "event type 1, data 0x7")),
    ],
)
def test_other_system_events(
    host: FakeHost, run: Callable[[memoryview], int], expected: UnhandledExit
) -> None:
    """KVM_EXIT_SYSTEM_EVENT of another type, or without data, stops the VM."""
    vm = start(host)
    host.runs[0] = [run]
    assert vm.run() == expected


def test_failed_entry(host: FakeHost) -> None:
    """KVM_EXIT_FAIL_ENTRY: reason (all ones for a destroyed VMSA) and processor."""
    vm = start(host)

    def run(area: memoryview) -> int:
        put(area, 9, "QI", (1 << 64) - 1, 3)
        return 0

    host.runs[0] = [run]
    assert vm.run() == EntryFailed((1 << 64) - 1, 3)


def test_internal_error(host: FakeHost) -> None:
    """KVM_EXIT_INTERNAL_ERROR: as many data words as KVM says there are."""
    vm = start(host)

    def run(area: memoryview) -> int:
        put(area, 17, "II3Q", 4, 2, 0xA, 0xB, 0xC)
        return 0

    host.runs[0] = [run]
    assert vm.run() == InternalError(4, (0xA, 0xB))


@pytest.mark.parametrize(("reason", "name"), [(2, "IO"), (6, "MMIO"), (77, "unknown to this VMM")])
def test_unhandled_exits(host: FakeHost, reason: int, name: str) -> None:
    """There are no devices: an exit that nobody answers stops the VM with its number and name."""
    vm = start(host)

    def run(area: memoryview) -> int:
        put(area, reason)
        return 0

    host.runs[0] = [run]
    assert vm.run() == UnhandledExit(reason, f"exit {reason} ({name})")


def test_vcpus_are_checked(host: FakeHost) -> None:
    """A vCPU that does not exist, and any vCPU of a closed VM, is a usage error."""
    vm = start(host, vcpus=2)
    assert vm.vcpus == 2
    for vcpu in (-1, 2):
        with pytest.raises(UsageError, match=f"vCPU {vcpu}"):
            vm.run(vcpu)
    vm.close()
    assert vm.vcpus == 0
    with pytest.raises(UsageError):
        vm.run(0)
