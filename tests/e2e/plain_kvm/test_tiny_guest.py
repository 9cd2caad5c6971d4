"""The tiny guest on the host's /dev/kvm, against a hypervisor's part that is played by hand."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import GhcbField, SevInfo, TerminateRequest
from swsnp.cpu.plain_kvm import HostVm, LinuxKvm, PlainKvmProcessor
from swsnp.cpu.plain_kvm.tiny_guest import (
    CODE,
    EXECUTABLE,
    GHCB_GPA,
    MARK,
    RESULT_GPA,
    SHARED_MARK_GPA,
    START,
    TinyGuestResult,
    tiny_guest_image,
)
from swsnp.hardware.exits import Halt, Vmgexit

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.e2e.plain_kvm.conftest import GuestMemory

    Answer = Callable[[GuestMemory, int], int]

C_BIT_OF_MODEL = 51
SEV_INFO = SevInfo.of(code=1, cbit=C_BIT_OF_MODEL, min_version=1, max_version=2)


def sev_info(memory: GuestMemory, request: int) -> int:
    return SEV_INFO


def features(memory: GuestMemory, request: int) -> int:
    return 0x3081


def to_shared(memory: GuestMemory, request: int) -> int:
    memory.make_shared(request & 0xF_FFFF_FFFF_F000)
    return 0x15


def register(memory: GuestMemory, request: int) -> int:
    return request + 1


def through_ghcb(memory: GuestMemory, request: int) -> int:
    at = request + GhcbField.SW_EXIT_INFO_1
    memory.shared[at : at + 16] = bytes(8) + (3).to_bytes(8, "little")
    return request


HONEST: dict[int, Answer] = {
    0x002: sev_info,
    0x080: features,
    0x014: to_shared,
    0x012: register,
    0: through_ghcb,
}


def play(c_bit: int, memory: GuestMemory, answers: dict[int, Answer]) -> list[int]:
    """Load and run the tiny guest until it halts; returns what the GHCB MSR held at each VMGEXIT."""
    for gpa, content, _ in tiny_guest_image(c_bit):
        memory.private[gpa : gpa + len(content)] = content
    processor = PlainKvmProcessor(HostVm(LinuxKvm(), memory, EXECUTABLE), memory, start=START)
    requests = []
    try:
        while (left := processor.run()) == Vmgexit():
            requests.append(processor.ghcb_msr)
            if processor.ghcb_msr & 0xFFF == 0x100:
                return requests
            processor.ghcb_msr = answers[processor.ghcb_msr & 0xFFF](memory, processor.ghcb_msr)
    finally:
        processor.close()
    assert left == Halt()
    return requests


def test_image_is_whole_pages() -> None:
    """A launch takes whole pages; only the page of code is named executable."""
    image = tiny_guest_image(47)
    assert all(gpa % 4096 == 0 and len(content) % 4096 == 0 for gpa, content, _ in image)
    assert [(gpa, content.startswith(CODE)) for gpa, content, executable in image if executable] == [
        (0x8000, True)
    ]
    assert [(each.start, each.stop) for each in EXECUTABLE] == [(0x8000, 0x9000)]


def test_steps(c_bit: int, memory: GuestMemory) -> None:
    """GHCB 2.0: negotiate, features, page state change, registration, then an event through the GHCB."""
    assert play(c_bit, memory, HONEST) == [0x002, 0x080, 0x20_0000_0000_B014, 0xB012, GHCB_GPA]
    assert GHCB_GPA not in memory.validated, "rescinded before the page was given away"
    result = TinyGuestResult.parse(memory.private[RESULT_GPA : RESULT_GPA + TinyGuestResult.SIZE])
    assert result == TinyGuestResult(
        sev_info=0x0002_0001_3300_0001,
        hv_features=0x3081,
        page_state_change=0x15,
        registration=0xB013,
        ghcb_info_2=3,
        sev_status=7,
        mark=MARK,
    )


def test_ghcb_page(c_bit: int, memory: GuestMemory) -> None:
    """GHCB 2.0: the guest's event as the hypervisor finds it in shared memory, and only there."""
    found: dict[str, bytes] = {}

    def look(memory: GuestMemory, request: int) -> int:
        found["page"] = bytes(memory.shared[GHCB_GPA : GHCB_GPA + 4096])
        return through_ghcb(memory, request)

    play(c_bit, memory, HONEST | {0: look})
    page = found["page"]
    assert page[0x390:0x3A8] == (0x8000FFFD).to_bytes(8, "little") + bytes(16)
    assert int.from_bytes(page[0x3F0:0x400], "little") == 1 << 114 | 1 << 115 | 1 << 116
    assert page[0xFFA:0x1000] == b"\2\0\0\0\0\0"
    mark = MARK.to_bytes(4, "little")
    assert bytes(memory.shared[SHARED_MARK_GPA : SHARED_MARK_GPA + 4]) == mark
    assert bytes(memory.private[GHCB_GPA : GHCB_GPA + 4096]) == bytes(4096)


def ghcb_error(memory: GuestMemory, request: int) -> int:
    at = request + GhcbField.SW_EXIT_INFO_1
    memory.shared[at : at + 8] = (2).to_bytes(8, "little")
    return request


def lie(value: int) -> Answer:
    return lambda memory, request: value


@pytest.mark.parametrize(
    ("request_code", "answer", "reason_set", "reason_code"),
    [
        pytest.param(0x002, lie(0x0002_0001_3300_0002), 0, 0, id="no reply to SEV info"),
        pytest.param(0x002, lie(SEV_INFO.but(max_version=1)), 0, 0, id="GHCB 1 only"),
        pytest.param(0x080, lie(0x080), 0, 2, id="no reply to features"),
        pytest.param(0x080, lie(0x2081), 0, 2, id="no SNP feature"),
        pytest.param(0x014, lie(0x014), 1, 1, id="no reply to page state change"),
        pytest.param(0x014, lie(0x8000_0000_0000_0015), 1, 1, id="page state change refused"),
        pytest.param(0x012, lie(0xC013), 1, 0, id="another page registered"),
        pytest.param(0x012, lie(0x1_0000_B013), 1, 0, id="a page beyond 4 GiB registered"),
        pytest.param(0, ghcb_error, 0, 0, id="GHCB event refused"),
    ],
)
def test_lying_hypervisor(
    c_bit: int, memory: GuestMemory, request_code: int, answer: Answer, reason_set: int, reason_code: int
) -> None:
    """Linux: a wrong answer ends in a termination request with the set and code of what failed."""
    last = TerminateRequest(play(c_bit, memory, HONEST | {request_code: answer})[-1])
    assert (last.code, last.reason_set, last.reason_code) == (0x100, reason_set, reason_code)
    result = TinyGuestResult.parse(memory.private[RESULT_GPA : RESULT_GPA + TinyGuestResult.SIZE])
    assert result.mark == 0


def test_rescind_that_changes_nothing(c_bit: int, memory: GuestMemory) -> None:
    """Linux: PVALIDATE with the carry flag set found another state than the guest's own: set 1 code 2."""
    memory.validated.discard(GHCB_GPA)
    last = TerminateRequest(play(c_bit, memory, HONEST)[-1])
    assert (last.reason_set, last.reason_code) == (1, 2)
    result = TinyGuestResult.parse(memory.private[RESULT_GPA : RESULT_GPA + TinyGuestResult.SIZE])
    assert (result.pvalidate_code, result.pvalidate_carry) == (0, 0xFFFFFFFF)
