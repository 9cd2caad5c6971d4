"""Until a request's answer is ready other commands may run: it is still as if done in one piece."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_command import Command, Config, ConfigFlags, GctxAddress, PageReclaim, PlatformState
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import MsgReportReq
from swsnp.abi.snp_report import AttestationReport
from swsnp.crypto.ecdsa import verify
from swsnp.firmware.mailbox import Mailbox
from swsnp.hardware.memory import SystemMemory
from swsnp.hardware.rmp import RmpEntry
from swsnp.hardware.turn import Turn

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.firmware.conftest import Arm, MakeRig, Rig

REQUEST = bytes(MsgReportReq(report_data=b"\x5a" * 64))
REPORT = slice(0x20, 0x20 + 0x4A0)


def test_a_guest_that_ends_meanwhile_gets_no_answer(rig: Rig, meanwhile: Arm) -> None:
    """SNP_DECOMMISSION during the signature: INVALID_GUEST, nothing written (AMD 56860, command 94h)."""
    guest = rig.running()
    gone = GctxAddress(gctx_paddr=guest.gctx)
    meanwhile(lambda: rig.command(Command.SNP_DECOMMISSION, gone))
    answer = rig.request(guest, REQUEST)
    assert answer.status == S.INVALID_GUEST
    assert answer.page == bytes(4096)


def test_another_guest_in_the_same_context_page_is_not_answered(rig: Rig, meanwhile: Arm) -> None:
    """The page is a Context page again, of a guest that is not RUNNING: its state decides."""
    guest = rig.running()

    def replace_guest() -> None:
        gone = GctxAddress(gctx_paddr=guest.gctx)
        assert rig.command(Command.SNP_DECOMMISSION, gone) == 0
        assert rig.command(Command.SNP_GCTX_CREATE, gone) == 0

    meanwhile(replace_guest)
    assert rig.request(guest, REQUEST).status == S.INVALID_GUEST_STATE


def test_a_response_page_that_is_taken_back_meanwhile_is_not_written(rig: Rig, meanwhile: Arm) -> None:
    """SNP_PAGE_RECLAIM of the response page: INVALID_PAGE_STATE; the counter stays."""
    guest = rig.running()

    def take_back() -> None:
        (response,) = (page << 12 for page, entry in rig.rmp._entries.items() if _lent(entry))
        assert rig.command(Command.SNP_PAGE_RECLAIM, PageReclaim(page_paddr=response)) == 0

    meanwhile(take_back)
    answer = rig.request(guest, REQUEST)
    assert answer.status == S.INVALID_PAGE_STATE
    assert answer.page == bytes(4096)
    assert rig.context(guest).message_counts[0] == 0


def _lent(entry: RmpEntry) -> bool:
    return entry == RmpEntry(assigned=True, immutable=True)


def test_the_same_message_answered_meanwhile_is_out_of_sequence(rig: Rig, meanwhile: Arm) -> None:
    """Of two commands with one message the one that ends first is answered: AEAD_OFLOW for the other."""
    guest = rig.running()
    inner: list[int] = []
    signed = meanwhile(lambda: inner.append(rig.request(guest, REQUEST, msg_seqno=1).status))
    guest.seqno[0] = 1
    outer = rig.request(guest, REQUEST, msg_seqno=1)
    assert (inner, outer.status) == ([S.SUCCESS], S.AEAD_OFLOW)
    assert len(signed) == 2
    assert rig.context(guest).message_counts[0] == 2


def test_a_report_tells_the_configuration_at_its_end(rig: Rig, meanwhile: Arm) -> None:
    """SNP_CONFIG during the signature: the report is made and signed again, with the new values."""
    guest = rig.running()
    masked = Config(flags=ConfigFlags.of(mask_chip_id=1))
    signed = meanwhile(lambda: rig.command(Command.SNP_CONFIG, masked))
    answer = rig.request(guest, REQUEST)
    assert answer.status == S.SUCCESS
    report = AttestationReport.parse(answer.payload[REPORT])
    assert report.chip_id == bytes(64)
    assert len(signed) == 2
    x, y = rig.chip.vcek_public_point(report.reported_tcb)
    assert verify(signed[1], answer.payload[REPORT][0x2A0:], x=x, y=y)


def test_commands_for_others_change_nothing(rig: Rig, make_rig: MakeRig, meanwhile: Arm) -> None:
    """A guest that starts and one that ends beside it: signed once, the same bytes as without them."""
    alone = make_rig()
    expected = alone.request(alone.running(), REQUEST).payload
    guest = rig.running()

    def others() -> None:
        other = rig.running(asid=2)
        assert rig.command(Command.SNP_DECOMMISSION, GctxAddress(gctx_paddr=other.gctx)) == 0

    signed = meanwhile(others)
    assert rig.request(guest, REQUEST).payload == expected
    assert len(signed) == 1


def test_a_guest_that_ends_before_its_key_is_fetched_gets_no_answer(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SNP_DECOMMISSION between the look at the guest and at its keys: INVALID_GUEST."""
    guest = rig.running()
    genuine, ended = SystemMemory.read, list[int]()

    def read(memory: SystemMemory, address: int, size: int) -> bytes:
        if size == 4096 and not ended:
            ended.append(rig.command(Command.SNP_DECOMMISSION, GctxAddress(gctx_paddr=guest.gctx)))
        return genuine(memory, address, size)

    monkeypatch.setattr(SystemMemory, "read", read)
    assert rig.request(guest, REQUEST).status == S.INVALID_GUEST
    assert ended == [S.SUCCESS]


def test_what_is_refused_meanwhile_is_asked_again(rig: Rig) -> None:
    """A refusal counts when no other command can run: here SNP becomes INIT before that."""
    guest = rig.running()
    rig.platform.state = PlatformState.UNINIT

    @contextmanager
    def aside() -> Iterator[None]:
        yield
        rig.platform.state = PlatformState.INIT

    rig.platform.aside = aside()
    assert rig.request(guest, REQUEST).status == S.SUCCESS


def test_the_lock_is_free_during_the_signature_and_held_after(rig: Rig, meanwhile: Arm) -> None:
    """One lock per chip; a signature, which is most of a request's time, does not hold it."""
    lock = Turn()
    guest = rig.running()
    mailbox = Mailbox(rig.chip, memory=rig.memory, rmp=rig.rmp, trace=rig.trace, lock=lock)
    mailbox.platform.__dict__.update(guests=rig.platform.guests, state=rig.platform.state)
    rig.mailbox = mailbox
    seen: list[bool] = []
    meanwhile(lambda: seen.append(lock.locked()))
    with lock:
        assert rig.request(guest, REQUEST).status == S.SUCCESS
        assert lock.locked()
    assert seen == [False]


def test_the_lock_is_held_again_when_signing_fails(rig: Rig) -> None:
    """An interrupt of the host during the signature leaves the lock as the caller expects it."""
    lock = Turn()
    mailbox = Mailbox(rig.chip, memory=rig.memory, rmp=rig.rmp, trace=rig.trace, lock=lock)
    with lock:
        with pytest.raises(KeyboardInterrupt), mailbox.platform.aside:
            raise KeyboardInterrupt
        assert lock.locked()
