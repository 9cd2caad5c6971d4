"""Answers that a signal kept from their program (kernels before 5.19)."""

from __future__ import annotations

import threading

import pytest

from swsnp.front.wrap.replay import CallKey, LostAnswers, Transcript
from swsnp.guest.caller import BufferMemory, CallerFault

KEY: CallKey = (77, 16, (960, 0xC020_5300, 0x1000, 0, 0, 0))


class Program:
    """A caller with one page at 0x1000, and whether it waits."""

    def __init__(self) -> None:
        self.page = bytearray(range(128))
        self.memory = BufferMemory()
        self.memory.map(0x1000, self.page)
        self.waiting = True

    def waits(self) -> bool:
        return self.waiting

    def transcript(self) -> Transcript:
        return Transcript(self.memory, self.waits)


@pytest.fixture
def program() -> Program:
    return Program()


def carry_out(program: Program, lost: LostAnswers) -> None:
    """A call that reads 32 bytes, writes 8 of them and 4 others, and whose answer is lost."""
    transcript = program.transcript()
    assert transcript.read(0x1000, 32) == bytes(range(32))
    transcript.write(0x1018, b"\xff" * 8)
    transcript.write(0x1040, b"done")
    lost.keep(KEY, transcript.finish(-5))


@pytest.mark.parametrize("called_away_before_the_write_back", [True, False])
def test_the_repeated_call_gets_the_first_answer(
    program: Program, called_away_before_the_write_back: bool
) -> None:
    """Whether or not the write-back, which overlaps the request, was done the first time; and only once."""
    lost = LostAnswers()
    program.waiting = not called_away_before_the_write_back
    carry_out(program, lost)
    assert (program.page[0x18] == 0xFF) is not called_away_before_the_write_back
    program.waiting = True
    played = lost.play_back(KEY, program.memory, program.waits)
    assert played is not None
    assert played.result == -5
    assert program.page[0x18:0x20] == b"\xff" * 8
    assert program.page[0x40:0x44] == b"done"
    assert lost.play_back(KEY, program.memory, program.waits) is None


def test_a_new_request_at_the_same_address_is_not_answered_with_the_old(program: Program) -> None:
    """Without SA_RESTART the program got EINTR and may ask something else."""
    lost = LostAnswers()
    carry_out(program, lost)
    program.page[0] = 99
    assert lost.play_back(KEY, program.memory, program.waits) is None
    program.page[0] = 0
    assert lost.play_back(KEY, program.memory, program.waits) is None


def test_another_call_is_not_answered(program: Program) -> None:
    """Thread, number and arguments must be the same."""
    lost = LostAnswers()
    carry_out(program, lost)
    for other in ((78, *KEY[1:]), (77, 17, KEY[2]), (77, 16, (961, *KEY[2][1:]))):
        assert lost.play_back(other, program.memory, program.waits) is None
    assert lost.play_back(KEY, program.memory, program.waits) is not None


def test_called_away_again(program: Program) -> None:
    """Nothing is written, and the answer can be kept once more."""
    lost = LostAnswers()
    program.waiting = False
    carry_out(program, lost)
    played = lost.play_back(KEY, program.memory, program.waits)
    assert played is not None
    assert program.page[0x40:0x44] != b"done"
    lost.keep(KEY, played)
    program.waiting = True
    assert lost.play_back(KEY, program.memory, program.waits) is not None
    assert program.page[0x40:0x44] == b"done"


def test_memory_that_went_away(program: Program) -> None:
    """A request that cannot be read any more is a new one."""
    lost = LostAnswers()
    carry_out(program, lost)
    program.memory.unmap(0x1000)
    assert lost.play_back(KEY, program.memory, program.waits) is None
    with pytest.raises(CallerFault):
        program.transcript().read(0x1000, 1)


def test_only_so_many_are_kept(program: Program) -> None:
    """Programs that never come back must not fill the memory."""
    lost = LostAnswers()
    finished = program.transcript().finish(0)
    keys: list[CallKey] = [(tid, 16, ()) for tid in range(65)]
    for key in keys:
        lost.keep(key, finished)
    assert lost.play_back(keys[0], program.memory, program.waits) is None
    assert lost.play_back(keys[1], program.memory, program.waits) is finished
    assert lost.play_back(keys[64], program.memory, program.waits) is finished


def test_calls_of_one_thread_take_turns() -> None:
    """A repeated call waits for the first one; other threads do not."""
    lost = LostAnswers()
    order: list[str] = []
    started = threading.Event()

    def repeat() -> None:
        started.set()
        with lost.turn(1):
            order.append("repeated")

    thread = threading.Thread(target=repeat)
    with lost.turn(1):
        thread.start()
        started.wait()
        with lost.turn(2):
            order.append("another thread's")
        order.append("first")
    thread.join()
    assert order == ["another thread's", "first", "repeated"]
