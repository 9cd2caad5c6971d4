"""Dispatch, private copies, failure injection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.snp_command import Command, GctxAddress
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.firmware.mailbox import COMMANDS
from swsnp.trace import FirmwareCommand, TraceEvent

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import MakeRig, Rig

ABSENT = sorted(set(Command) - set(COMMANDS))


@pytest.mark.parametrize("command", [0, 1, 4, 0x20, 0x31, 0x80, 0x96, 0xB2, 0xCC, 0xD0, 0xFFFF, *ABSENT])
def test_commands_that_are_not_built_in(rig: Rig, command: int) -> None:
    """AMD 56860: an id that is unknown, or known but not built in, is INVALID_COMMAND."""
    assert rig.mailbox.command(command, rig.buffer) == S.INVALID_COMMAND


@pytest.mark.parametrize("command", [c for c, row in COMMANDS.items() if row.buffer is not None])
def test_a_command_buffer_that_is_no_memory(rig: Rig, command: int) -> None:
    """A buffer address that no memory answers for is INVALID_ADDRESS."""
    assert rig.mailbox.command(command, 0x7777_7777_7000) == S.INVALID_ADDRESS


@pytest.mark.parametrize("command", [Command.NOP, Command.SNP_DF_FLUSH, Command.SNP_SHUTDOWN])
def test_commands_without_a_buffer_ignore_the_address(rig: Rig, command: int) -> None:
    """AMD 56860: SNP_INIT, SNP_SHUTDOWN and SNP_DF_FLUSH have no buffer."""
    assert rig.mailbox.command(command, 0x7777_7777_7000) == S.SUCCESS


def test_injected_failures(rig: Rig) -> None:
    """A status is answered once, several times, or until taken back; the command is not carried out."""
    create = GctxAddress(gctx_paddr=rig.page())
    rig.mailbox.inject(Command.SNP_GCTX_CREATE, 0x13)
    assert rig.command(Command.SNP_GCTX_CREATE, create) == 0x13
    assert rig.platform.guests == {}
    assert rig.command(Command.SNP_GCTX_CREATE, create) == S.SUCCESS
    rig.mailbox.inject(Command.NOP, 0x1234, times=2)
    rig.mailbox.inject(Command.SNP_DF_FLUSH, 7, times=None)
    assert [rig.command(Command.NOP) for _ in range(3)] == [0x1234, 0x1234, 0]
    assert [rig.command(Command.SNP_DF_FLUSH) for _ in range(5)] == [7] * 5
    rig.mailbox.inject(Command.SNP_DF_FLUSH, 7, times=0)
    assert rig.command(Command.SNP_DF_FLUSH) == S.SUCCESS
    rig.mailbox.inject(0x555, 0, times=1)
    assert rig.command(0x555) == 0
    assert rig.command(0x555) == S.INVALID_COMMAND


def test_injected_delays(rig: Rig) -> None:
    """A command waits before it is carried out, once, several times or until taken back; others do not."""
    rig.mailbox.delay(Command.NOP, 0.5)
    rig.mailbox.delay(Command.SNP_DF_FLUSH, 2.0, times=None)
    assert [rig.command(Command.NOP) for _ in range(2)] == [S.SUCCESS] * 2
    assert rig.slept == [0.5]
    rig.mailbox.inject(Command.SNP_DF_FLUSH, 7)
    assert [rig.command(Command.SNP_DF_FLUSH) for _ in range(2)] == [7, S.SUCCESS]
    assert rig.slept == [0.5, 2.0, 2.0]
    rig.mailbox.delay(Command.SNP_DF_FLUSH, 2.0, times=0)
    assert rig.command(Command.SNP_DF_FLUSH) == S.SUCCESS
    assert rig.slept == [0.5, 2.0, 2.0]


def test_every_command_is_traced(rig: Rig) -> None:
    """Each command ends with one event, injected ones too."""
    heard: list[TraceEvent] = []
    rig.mailbox.inject(Command.NOP, 9)
    with rig.trace.listen(heard.append):
        rig.command(Command.NOP)
        rig.command(Command.NOP)
        rig.command(0x999)
    assert heard == [
        FirmwareCommand(command=0xE, status=9),
        FirmwareCommand(command=0xE, status=0),
        FirmwareCommand(command=0x999, status=0x11),
    ]


def test_random_command_buffers_never_raise(make_rig: MakeRig) -> None:
    """Whatever the host puts into a command buffer, the mailbox answers with a status of AMD 56860."""
    rig = make_rig()
    gctx = rig.launching()
    addresses = st.sampled_from([gctx, rig.page(), rig.guest_page(1, 0x1000), rig.buffer, 0, gctx | 1])
    words = st.one_of(addresses, st.integers(0, 3), st.integers(0, (1 << 64) - 1))

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(command=st.sampled_from(sorted(COMMANDS)), buffer=st.lists(words, min_size=8, max_size=8))
    def body(command: int, buffer: list[int]) -> None:
        rig.memory.write(rig.buffer, b"".join(word.to_bytes(8, "little") for word in buffer))
        assert S(rig.mailbox.command(command, rig.buffer)) in S

    body()
