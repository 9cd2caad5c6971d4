"""Limits of the guest's own checks, and answers of a host that are wrong in one way only."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.errors import UsageError
from swsnp.guest.boot import boot
from swsnp.guest.caller import BufferMemory
from swsnp.guest.terminate import GuestTerminated

if TYPE_CHECKING:
    from tests.unit.guest.conftest import GhcbEvent, ScriptedHost

SVSM = 0x1140
"""OS area 2 of the secrets page of the scripted host."""


@pytest.mark.parametrize(
    ("request_code", "reply", "wanted"),
    [
        pytest.param(0x002, 0x0002000133000002, (0, 0), id="good versions under another code"),
        pytest.param(0x014, 0x0000000000000014, (1, 1), id="no error under another code"),
    ],
)
def test_an_answer_needs_its_code(
    host: ScriptedHost, request_code: int, reply: int, wanted: tuple[int, int]
) -> None:
    """GHCB 2.0, MSR protocol: the low 12 bits of an answer say what it is; the rest counts only then."""
    host.msr_replies[request_code] = reply
    with pytest.raises(GuestTerminated) as caught:
        host.run(boot(host.cpu, host.layout))
    assert (caught.value.reason_set, caught.value.reason_code) == wanted


def test_there_are_four_privilege_levels(host: ScriptedHost) -> None:
    """AMD 56421, secrets page OS area 2: VMPL 4 is none."""
    struct.pack_into("<QQQIB", host.memory.private, SVSM, 0, 0x1000, 0, 1, 4)
    with pytest.raises(GuestTerminated) as caught:
        host.run(boot(host.cpu, host.layout))
    assert (caught.value.reason_set, caught.value.reason_code) == (1, 8)


def test_a_host_may_do_nothing_for_a_while(host: ScriptedHost) -> None:
    """Linux, vmgexit_psc: no progress is no error, the guest asks again."""
    calls = []

    def at_the_third(event: GhcbEvent) -> tuple[int, int]:
        calls.append(event.code)
        return host._psc(event) if len(calls) == 3 else (0, 0)

    host.psc = at_the_third
    assert host.boot().version == 2
    assert len(calls) == 3


def test_buffers_may_touch_but_not_overlap() -> None:
    """A calling program's memory: the byte after one mapping may be another's first, from either side."""
    memory = BufferMemory()
    memory.map(0x2000, bytearray(16))
    memory.map(0x2010, bytearray(16))
    memory.map(0x1FF0, bytearray(16))
    for address in (0x1FEF + 2, 0x200F, 0x201F):
        with pytest.raises(UsageError, match="overlaps the buffer at"):
            memory.map(address, bytearray(16))
