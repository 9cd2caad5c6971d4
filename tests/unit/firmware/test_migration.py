"""MSG_EXPORT, MSG_IMPORT, MSG_ABSORB, MSG_ABSORB_NOMA, MSG_VMRK."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tests.unit.firmware.conftest import RigGuest

from swsnp.abi.snp_command import Command, GuestRequest, PageType
from swsnp.abi.snp_command import FirmwareStatus as S
from swsnp.abi.snp_message import MessageType, MsgKeyReq, MsgReportReq, RootKeySelect, message_header
from swsnp.abi.snp_migration import (
    ContextFlags,
    ExportedContext,
    ExportFlags,
    MetadataEntry,
    MetadataWord,
    MsgExportReq,
    MsgExportRsp,
    MsgImportReq,
    MsgStatusRsp,
    MsgVmrkReq,
)
from swsnp.abi.snp_report import AttestationReport, GuestPolicy
from swsnp.crypto.seal import MessageKey
from swsnp.firmware.context import GuestState
from swsnp.firmware.platform import AsidState
from swsnp.hardware.rmp import PageState

if TYPE_CHECKING:
    from tests.unit.firmware.conftest import Arm, MakeRig, Rig

MIGRATABLE = GuestPolicy.of(smt=1, reserved_one=1, migrate_ma=1)
ROOT = MetadataEntry(page=MetadataWord.of(valid=1, metadata=1))
NOWHERE = 0x7777_7777_7000


def _owned(rig: Rig, agent: RigGuest, asid: int = 2) -> RigGuest:
    """A running guest whose migration agent is `agent`."""
    gctx = rig.create()
    assert rig.start(gctx, policy=MIGRATABLE, flags=1, ma_gctx_paddr=agent.gctx) == 0
    assert rig.activate(gctx, asid) == 0
    assert rig.update(gctx, rig.guest_page(asid, 0x1000, b"code")) == 0
    assert rig.finish(gctx, host_data=b"h" * 32) == 0
    return RigGuest(gctx, asid, list(rig.context(gctx).message_keys))


def _imi(rig: Rig, asid: int, **fields: Any) -> int:
    """An IMI in LAUNCH, one page measured."""
    gctx = rig.create()
    assert rig.start(gctx, policy=MIGRATABLE, **({"flags": 2} | fields)) == 0
    assert rig.activate(gctx, asid) == 0
    page = rig.guest_page(asid, 0x1000, b"imi")
    assert rig.update(gctx, page, PageType.NORMAL, info={"imi_page": 1}) == 0
    return gctx


def _export(
    rig: Rig, caller: RigGuest, gctx: int, *, imi_en: int = 0, vmpck: int = 0, **bad: Any
) -> MsgExportRsp:
    request = MsgExportReq(gctx_paddr=gctx, flags=ExportFlags(imi_en)).but(**bad)
    answer = rig.request(caller, bytes(request), MessageType.EXPORT_REQ, vmpck=vmpck)
    assert (answer.status, answer.header.msg_size) == (S.SUCCESS, 0xFA0)
    return MsgExportRsp.parse(answer.payload)


def _send(rig: Rig, caller: RigGuest, msg_type: int, request: Any, vmpck: int = 0) -> int:
    answer = rig.request(caller, bytes(request), msg_type, vmpck=vmpck)
    assert (answer.status, answer.header.msg_size) == (S.SUCCESS, 16)
    return MsgStatusRsp.parse(answer.payload).status


def _import(gctx: int, context: ExportedContext, **bad: Any) -> MsgImportReq:
    return MsgImportReq(gctx_paddr=gctx, context_size=0x300, context_version=3, context=context).but(**bad)


# --- EXPORT ---------------------------------------------------------------------------------------


def test_an_agent_exports_its_guest(rig: Rig) -> None:
    """AMD 56860, exported context: every field; the guest ends and its page is Firmware again."""
    agent = rig.running(1)
    guest = _owned(rig, agent)
    assert rig.request(guest, bytes(MsgReportReq())).status == S.SUCCESS
    kept = rig.context(guest)
    kept.root_md_entry, kept.oek_iv_count = ROOT, 7
    vmpcks, oek, vmrk = kept.vmpcks, kept.oek, kept.vmrk
    answer = _export(rig, agent, guest.gctx)
    assert (answer.status, answer.context_size, answer.context_version) == (S.SUCCESS, 0x300, 3)
    assert ExportedContext.parse(answer.context) == ExportedContext(
        ld=kept.ld,
        oek=oek,
        vmpck0=vmpcks[0],
        vmpck1=vmpcks[1],
        vmpck2=vmpcks[2],
        vmpck3=vmpcks[3],
        vmrk=vmrk,
        host_data=b"h" * 32,
        report_id=kept.report_id,
        imd=bytes(48),
        msg_counts=(2, 0, 0, 0),
        root_md_entry=ROOT,
        policy=MIGRATABLE,
        state=2,
        oek_iv_count=7,
        launch_tcb=rig.chip.variables.committed_tcb,
    )
    assert guest.gctx not in rig.platform.guests
    assert rig.state(guest.gctx) is PageState.FIRMWARE
    assert rig.platform.asids[2] is AsidState.DIRTY


def test_export_for_an_imi_leaves_the_guest(rig: Rig) -> None:
    """AMD 56860: with IMI_EN the guest lives on and the root metadata entry is zero."""
    agent = rig.running(1)
    guest = _owned(rig, agent)
    rig.context(guest).root_md_entry = ROOT
    rig.context(guest).author_key_en = rig.context(guest).vcek_dis = True
    context = ExportedContext.parse(_export(rig, agent, guest.gctx, imi_en=1).context)
    assert context.root_md_entry == MetadataEntry()
    assert context.flags == ContextFlags.of(author_key_en=1, vcek_dis=1)
    assert rig.context(guest).root_md_entry == ROOT
    assert rig.state(guest.gctx) is PageState.CONTEXT


def test_a_guest_without_agent_exports_itself(rig: Rig) -> None:
    """AMD 56860: under VMPCK0 only; the counters in the context are those after the answer."""
    guest = rig.running(1)
    assert _export(rig, guest, guest.gctx, vmpck=1).status == S.INVALID_GUEST
    context = ExportedContext.parse(_export(rig, guest, guest.gctx, imi_en=1).context)
    assert context.msg_counts == tuple(rig.context(guest).message_counts) == (2, 2, 0, 0)
    context = ExportedContext.parse(_export(rig, guest, guest.gctx).context)
    assert context.msg_counts == (4, 2, 0, 0)
    assert rig.platform.guests == {}


def test_export_checks_in_order(rig: Rig) -> None:
    """AMD 56860: reserved bits, context, state, who may; all inside the response."""
    agent, stranger = rig.running(1), rig.running(3)
    guest = _owned(rig, agent)
    launching = rig.launching(4)
    for bad in ({"gctx_paddr": guest.gctx + 8}, {"flags": ExportFlags(2)}, {"reserved_0c": 1}):
        assert _export(rig, agent, NOWHERE, **bad).status == S.INVALID_PARAM
    assert _export(rig, agent, NOWHERE).status == S.INVALID_GUEST
    assert _export(rig, agent, launching).status == S.INVALID_GUEST_STATE
    assert _export(rig, stranger, guest.gctx).status == S.INVALID_GUEST
    assert _export(rig, guest, guest.gctx).status == S.INVALID_GUEST  # it has an agent
    answer = _export(rig, stranger, agent.gctx)
    assert answer == MsgExportRsp(status=S.INVALID_GUEST)
    rig.context(stranger).report_id = rig.context(agent).report_id  # the same name behind another page
    assert _export(rig, stranger, guest.gctx).status == S.INVALID_GUEST
    rig.context(agent).report_id = bytes(32)  # another guest behind the same page
    assert _export(rig, agent, guest.gctx).status == S.INVALID_GUEST


def test_an_export_that_does_not_fit_its_page_loses_nothing(rig: Rig) -> None:
    """AMD 56860, check 17: the response fills a page; from an offset it is INVALID_PARAM, the guest lives."""
    guest = rig.running(1)
    response = rig.page()
    payload = bytes(MsgExportReq(gctx_paddr=guest.gctx))
    header = message_header(msg_seqno=1, msg_type=7, msg_version=1, msg_size=16, msg_vmpck=0)
    request = rig.page(data=guest.keys[0].seal(header, payload))
    buffer = GuestRequest(gctx_paddr=guest.gctx, request_paddr=request, response_paddr=response + 16)
    assert rig.command(Command.SNP_GUEST_REQUEST, buffer) == S.INVALID_PARAM
    assert rig.context(guest).message_counts == [0, 0, 0, 0]


# --- IMPORT ---------------------------------------------------------------------------------------


def _swapped_context(rig: Rig, agent: RigGuest) -> tuple[RigGuest, ExportedContext]:
    guest = _owned(rig, agent)
    rig.context(guest).root_md_entry = ROOT
    return guest, ExportedContext.parse(_export(rig, agent, guest.gctx).context)


def test_a_guest_moves_to_another_host(make_rig: MakeRig) -> None:
    """AMD 56860: INIT -> RUNNING with the old keys, a new REPORT_ID and the caller as agent."""
    here, there = make_rig(), make_rig(seed=b"there")
    guest, context = _swapped_context(here, here.running(1))
    agent = there.running(1)
    target = there.create()
    assert _send(there, agent, MessageType.IMPORT_REQ, _import(target, context)) == S.SUCCESS
    imported = there.context(target)
    assert (imported.state, imported.asid, imported.active) == (GuestState.RUNNING, 0, False)
    assert imported.root_md_entry == ROOT
    assert there.activate(target, 2) == 0
    assert imported.active
    guest.gctx = target
    answer = there.request(guest, bytes(MsgReportReq()))
    report = AttestationReport.parse(answer.payload[0x20:])
    assert report.measurement == context.ld
    assert report.report_id == imported.report_id != context.report_id
    assert report.report_id_ma == there.context(agent).report_id
    assert report.launch_tcb == context.launch_tcb
    assert _export(there, agent, target).status == S.SUCCESS


def test_import_checks_in_order(rig: Rig) -> None:
    """AMD 56860: reserved bits, size and version, context, state, root entry."""
    agent = rig.running(1)
    _, context = _swapped_context(rig, agent)
    target, empty = rig.create(), context.but(root_md_entry=MetadataEntry())
    request = _import(NOWHERE, empty, context_size=1)

    def send(request: MsgImportReq) -> int:
        return _send(rig, agent, MessageType.IMPORT_REQ, request)

    assert send(request.but(reserved_010=b"\1" + bytes(15))) == S.INVALID_PARAM
    assert send(request.but(gctx_paddr=target + 8)) == S.INVALID_PARAM
    assert send(request) == S.INVALID_PARAM
    assert send(_import(NOWHERE, empty, context_version=2)) == S.INVALID_PARAM
    assert send(_import(NOWHERE, empty)) == S.INVALID_GUEST
    assert send(_import(agent.gctx, empty)) == S.INVALID_GUEST_STATE
    assert send(_import(target, empty)) == S.INVALID_MDATA_ENTRY
    assert rig.context(target).state is GuestState.INIT


# --- ABSORB ---------------------------------------------------------------------------------------


def test_a_guest_takes_the_place_of_an_imi(rig: Rig) -> None:
    """AMD 56860: LAUNCH -> RUNNING; REPORT_ID stays the IMI's, its activation becomes active."""
    agent = rig.running(1)
    guest = _owned(rig, agent)
    target = _imi(rig, 5)
    report_id, measured = rig.context(target).report_id, rig.context(target).ld
    rig.context(guest).imd = measured
    context = ExportedContext.parse(_export(rig, agent, guest.gctx, imi_en=1).context)
    assert _send(rig, agent, MessageType.ABSORB_REQ, _import(target, context)) == S.SUCCESS
    absorbed = rig.context(target)
    assert (absorbed.state, absorbed.active, absorbed.report_id) == (GuestState.RUNNING, True, report_id)
    assert (absorbed.ld, absorbed.vmpcks) == (context.ld, rig.context(guest).vmpcks)
    assert rig.platform.asids[5] is AsidState.IN_USE


def test_absorb_checks_in_order(rig: Rig) -> None:
    """AMD 56860: reserved bits, context, state, root entry, IMD, and only then size and version."""
    agent = rig.running(1)
    guest = _owned(rig, agent)
    target, plain = _imi(rig, 5), rig.launching(6)
    context = ExportedContext.parse(_export(rig, agent, guest.gctx, imi_en=1).context)
    rooted = context.but(root_md_entry=ROOT)

    def send(request: MsgImportReq) -> int:
        return _send(rig, agent, MessageType.ABSORB_REQ, request)

    assert send(_import(target + 8, rooted, context_size=1)) == S.INVALID_PARAM
    assert send(_import(NOWHERE, rooted, context_size=1)) == S.INVALID_GUEST
    assert send(_import(plain, rooted, context_size=1)) == S.INVALID_GUEST_STATE
    assert send(_import(guest.gctx, rooted, context_size=1)) == S.INVALID_GUEST_STATE
    assert send(_import(target, rooted, context_size=1)) == S.INVALID_MDATA_ENTRY
    assert send(_import(target, context, context_size=1)) == S.BAD_MEASUREMENT
    right = context.but(imd=rig.context(target).ld)
    assert send(_import(target, right, context_size=1)) == S.INVALID_PARAM
    assert send(_import(target, right)) == S.SUCCESS
    assert send(_import(target, right)) == S.INVALID_GUEST_STATE  # an IMI still, but it runs


# --- ABSORB_NOMA ----------------------------------------------------------------------------------


def _running_imi(rig: Rig) -> RigGuest:
    """An IMI that runs: launched without IMI_EN, all of its pages IMI pages."""
    gctx = _imi(rig, 5, flags=0)
    assert rig.context(gctx).ld == rig.context(gctx).imd
    assert rig.finish(gctx) == 0
    return RigGuest(gctx, 5, list(rig.context(gctx).message_keys))


def test_an_imi_becomes_the_guest(rig: Rig) -> None:
    """AMD 56860: answered under the old key; after that the keys and counters of the context hold."""
    guest = rig.running(1)
    rig.request(guest, bytes(MsgReportReq()))
    imi = _running_imi(rig)
    rig.context(guest).imd = rig.context(imi).ld
    context = ExportedContext.parse(_export(rig, guest, guest.gctx).context)
    assert context.msg_counts == (4, 0, 0, 0)
    assert _send(rig, imi, MessageType.ABSORB_NOMA_REQ, _import(0, context)) == S.SUCCESS
    absorbed = rig.context(imi)
    assert (absorbed.ld, absorbed.message_counts) == (context.ld, [4, 0, 0, 0])
    assert rig.request(imi, bytes(MsgReportReq())).status == S.BAD_MEASUREMENT
    imi.keys, imi.seqno = [MessageKey(key) for key in absorbed.vmpcks], [5, 1, 1, 1]
    assert rig.request(imi, bytes(MsgReportReq())).status == S.SUCCESS


def test_a_report_is_not_answered_under_a_key_that_is_gone(rig: Rig, meanwhile: Arm) -> None:
    """MSG_ABSORB_NOMA_REQ during a signature: the report's message is under a key that no longer holds."""
    imi = _running_imi(rig)
    own = rig.context(imi)
    context = ExportedContext.parse(_export(rig, imi, imi.gctx, imi_en=1, vmpck=0).context)
    other_keys = context.but(vmpck0=bytes(32), msg_counts=tuple(own.message_counts), imd=own.ld)
    absorbed: list[int] = []

    def absorb() -> None:
        request = _import(0, other_keys)
        absorbed.append(_send(rig, imi, MessageType.ABSORB_NOMA_REQ, request, vmpck=1))

    signed = meanwhile(absorb)
    assert rig.request(imi, bytes(MsgReportReq())).status == S.BAD_MEASUREMENT
    assert (absorbed, len(signed)) == ([S.SUCCESS], 1)
    assert own.message_counts == list(other_keys.msg_counts)


def test_absorb_noma_checks_in_order(rig: Rig) -> None:
    """AMD 56860: reserved bits (the address is one), agent, digests, size and version."""
    imi = _running_imi(rig)
    own = rig.context(imi)
    context = ExportedContext.parse(_export(rig, imi, imi.gctx, imi_en=1).context)
    wrong = context.but(imd=bytes(48))

    def send(request: MsgImportReq) -> int:
        return _send(rig, imi, MessageType.ABSORB_NOMA_REQ, request)

    own.ma_paddr, kept = imi.gctx, own.ma_paddr
    assert send(_import(0x1000, wrong, context_size=1)) == S.INVALID_PARAM
    assert send(_import(0, wrong, context_size=1)) == S.INVALID_GUEST
    own.ma_paddr = kept
    assert send(_import(0, wrong, context_size=1)) == S.BAD_MEASUREMENT
    right = context.but(imd=own.ld)
    own.imd = bytes(48)  # as if some page had not been an IMI page
    assert send(_import(0, right, context_size=1)) == S.BAD_MEASUREMENT
    own.imd = own.ld
    assert send(_import(0, right, context_version=4)) == S.INVALID_PARAM


# --- VMRK -----------------------------------------------------------------------------------------


def test_an_agent_gives_the_root_key(rig: Rig) -> None:
    """AMD 56860: keys derived from the VM root key are then those of the agent's choice."""
    agent = rig.running(1)
    keys = []
    for asid in (2, 3):
        gctx = rig.create()
        assert rig.start(gctx, policy=MIGRATABLE, flags=1, ma_gctx_paddr=agent.gctx) == 0
        assert rig.activate(gctx, asid) == 0
        request = MsgVmrkReq(gctx_paddr=gctx, vmrk=b"k" * 32)
        assert _send(rig, agent, MessageType.VMRK_REQ, request) == S.SUCCESS
        assert rig.finish(gctx) == 0
        guest = RigGuest(gctx, asid, list(rig.context(gctx).message_keys))
        answer = rig.request(guest, bytes(MsgKeyReq(flags=RootKeySelect(1))), MessageType.KEY_REQ)
        keys.append(answer.payload)
    assert keys[0] == keys[1]


def test_vmrk_checks_in_order(rig: Rig) -> None:
    """AMD 56860: VMPCK0, reserved bits, context, state, agent."""
    agent = rig.running(1)
    imi = _imi(rig, 5, flags=3, ma_gctx_paddr=agent.gctx)
    strangers = rig.launching(6)
    before = rig.context(strangers).vmrk

    def send(gctx: int, vmpck: int = 0, **bad: Any) -> int:
        return _send(rig, agent, MessageType.VMRK_REQ, MsgVmrkReq(gctx_paddr=gctx).but(**bad), vmpck)

    assert send(NOWHERE, vmpck=1) == S.INVALID_PARAM
    assert send(NOWHERE, reserved_08=b"\1" + bytes(23)) == S.INVALID_PARAM
    assert send(NOWHERE + 8) == S.INVALID_PARAM
    assert send(NOWHERE) == S.INVALID_GUEST
    assert send(agent.gctx) == send(imi) == S.INVALID_GUEST_STATE
    assert send(strangers) == S.INVALID_GUEST
    assert rig.context(strangers).vmrk == before


def test_nothing_shows_a_key(rig: Rig) -> None:
    """Records that carry keys do not print them."""
    agent = rig.running(1)
    guest = _owned(rig, agent)
    answer = _export(rig, agent, guest.gctx, imi_en=1)
    context = ExportedContext.parse(answer.context)
    shown = repr(answer) + repr(context) + repr(_import(0, context)) + repr(MsgVmrkReq(vmrk=b"k" * 32))
    assert shown.count("withheld") == 4
    assert repr(context.vmpck0)[2:12] not in shown
