"""Boot: version negotiation, features, GHCB registration, page state changes, secrets page; further vCPUs."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.vmsa import Vmsa
from swsnp.errors import LayoutError, UsageError
from swsnp.guest.ap import ApRefused, place_vmsa, start_ap
from swsnp.guest.boot import GuestLayout, boot, boot_ap
from swsnp.guest.page_state import share_pages
from swsnp.guest.terminate import GuestTerminated
from swsnp.hardware import GuestAccessFault

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.guest.conftest import FakeCpu, GhcbEvent, ScriptedHost

SECRETS = 0x1000
CPUID = 0x2000
SHARED = [0x5000, 0x6000, 0x8000, 0x9000, 0xA000, 0xB000]
VMSA = 0xD000


def terminate_word(reason_set: int, code: int) -> int:
    return 0x100 | reason_set << 12 | code << 16


def terminated(host: ScriptedHost, layout: GuestLayout | None = None) -> tuple[int, int]:
    """Boot, expect a termination, and return set and code as raised; the MSR must have said the same."""
    with pytest.raises(GuestTerminated) as caught:
        host.run(boot(host.cpu, layout or host.layout))
    error = caught.value
    assert host.msr_requests[-1] == terminate_word(error.reason_set, error.reason_code)
    return error.reason_set, error.reason_code


def test_shortest_trace(host: ScriptedHost) -> None:
    """GHCB 2.0, MSR protocol: 002h, 080h, share the GHCB page (014h, op 2), register it (012h)."""
    guest = host.boot()
    assert host.msr_requests == [0x002, 0x080, 0x0020000000003014, 0x3012]
    assert [(event.code, event.scratch) for event in host.events] == [(0x80000010, 0x3800)]
    assert host.psc_entries == [2 << 52 | gpa for gpa in SHARED]
    assert (guest.version, guest.features, guest.vmpl) == (2, 3, 0)
    assert guest.secrets.gpa == SECRETS
    assert guest.ghcbs[0].gpa == 0x3000
    assert guest.ghcb_of(host.cpu) is guest.ghcbs[0]
    assert guest.layout is host.layout


def test_validation_is_rescinded_before_each_page_is_shared(host: ScriptedHost) -> None:
    """Linux: PVALIDATE off precedes the request, so that no validated page stays behind a shared one."""
    order: list[tuple[object, ...]] = []
    host.memory.calls = order

    def psc(event: GhcbEvent) -> tuple[int, int]:
        order.append(("psc",))
        return host._psc(event)

    host.psc = psc
    host.boot()
    assert order == [
        ("pvalidate", 0x3000, False),
        *(("pvalidate", gpa, False) for gpa in SHARED),
        ("psc",),
    ]


def test_a_page_that_nobody_accepted_can_be_shared(host: ScriptedHost) -> None:
    """PVALIDATE off on a page that is not validated changes nothing (carry), and that is the state wanted."""
    host.memory.validated -= {0x3000, *SHARED}
    assert host.boot().version == 2


@pytest.mark.parametrize(
    ("reply", "version"),
    [(0x0002000133000001, 2), (0x0003000133000001, 2), (0xFFFF000233000001, 2), (0x0002000033000001, 2)],
)
def test_version_is_the_highest_common_one(host: ScriptedHost, reply: int, version: int) -> None:
    """Linux, sev_es_negotiate_protocol: the smaller of the host's maximum and 2."""
    host.msr_replies[0x002] = reply
    assert host.boot().version == version


@pytest.mark.parametrize(
    ("code", "reply", "wanted"),
    [
        pytest.param(0x002, 0x002, (0, 0), id="no SEV information"),
        pytest.param(0x002, 0x0000000033000001, (0, 0), id="maximum 0"),
        pytest.param(0x002, 0x0004000333000001, (0, 0), id="minimum 3"),
        pytest.param(0x002, 0x0001000133000001, (0, 2), id="version 1: no SNP"),
        pytest.param(0x080, 0x080, (0, 2), id="no features"),
        pytest.param(0x080, 0x2081, (0, 2), id="features without SNP"),
        pytest.param(0x014, 0x8000000000000015, (1, 1), id="GHCB page stays private"),
        pytest.param(0x014, 0x0000000100000015, (1, 1), id="any error in the high half"),
        pytest.param(0x014, 0x0020000000003014, (1, 1), id="no page state answer"),
        pytest.param(0x012, 0x3012, (1, 0), id="no registration answer"),
        pytest.param(0x012, 0x4013, (1, 0), id="another GFN registered"),
        pytest.param(0x012, 0xFFFFFFFFFFFFF013, (1, 0), id="registration refused"),
    ],
)
def test_msr_protocol_refusals(host: ScriptedHost, code: int, reply: int, wanted: tuple[int, int]) -> None:
    """GHCB 2.0 and Linux: which reason the guest terminates with when the host's MSR answer is unfit."""
    host.msr_replies[code] = reply
    assert terminated(host) == wanted


def test_version_1_host_is_not_asked_for_features(host: ScriptedHost) -> None:
    """GHCB 2.0: the feature request exists since version 2."""
    host.msr_replies[0x002] = 0x0001000133000001
    assert terminated(host) == (0, 2)
    assert 0x080 not in host.msr_requests


def test_pvalidate_failure_terminates(host: ScriptedHost) -> None:
    """Linux: PVALIDATE failure is set 1, code 2, before the host is asked for anything."""
    host.memory.pvalidate_code = 6
    assert terminated(host) == (1, 2)
    assert host.msr_requests == [0x002, 0x080, terminate_word(1, 2)]


def test_termination_is_final_even_if_the_host_resumes(host: ScriptedHost) -> None:
    """GHCB 2.0: a guest that asked for its end does not go on."""
    host.msr_replies[0x002] = 0
    program = boot(host.cpu, host.layout)
    next(program)
    host.vmgexit(host.cpu)
    next(program)
    assert host.cpu.ghcb_msr == 0x100
    with pytest.raises(GuestTerminated, match="set 0 code 0"):
        next(program)


# page state change through the page


def _header(
    host: ScriptedHost, cur: int, end: int, reserved: int = 0
) -> Callable[[GhcbEvent], tuple[int, int]]:
    def step(event: GhcbEvent) -> tuple[int, int]:
        assert event.scratch is not None
        struct.pack_into("<HHI", host.memory.shared, event.scratch, cur, end, reserved)
        return 0, 0

    return step


def test_host_may_return_in_between(host: ScriptedHost) -> None:
    """GHCB 2.0, page state change: the guest asks again until cur_entry has passed end_entry."""
    seen: list[int] = []

    def one_at_a_time(event: GhcbEvent) -> tuple[int, int]:
        assert event.scratch is not None
        (cur,) = struct.unpack_from("<H", host.memory.shared, event.scratch)
        seen.append(cur)
        host.memory.shared_pages.add(SHARED[cur])
        struct.pack_into("<H", host.memory.shared, event.scratch, cur + 1)
        return 0, 0

    host.psc = one_at_a_time
    host.boot()
    assert seen == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "reply",
    [
        (0, 0x0000010000000000),
        (0, 0x0000000100000001),
        (0, 0x0000000100000002),
        (2, 3),
        (2, 0),
        (1, 0x8000030D),
    ],
)
def test_page_state_errors(host: ScriptedHost, reply: tuple[int, int]) -> None:
    """GHCB 2.0: any error of a page state change ends the guest, set 1 code 1."""
    host.psc = lambda _: reply
    assert terminated(host) == (1, 1)


@pytest.mark.parametrize(
    "header",
    [
        pytest.param((0, 6, 0), id="end moved up"),
        pytest.param((6, 5, 1), id="reserved not zero"),
        pytest.param((0xFFFF, 0xFFFF, 0), id="both beyond"),
    ],
)
def test_page_state_header_is_checked(host: ScriptedHost, header: tuple[int, int, int]) -> None:
    """Linux, vmgexit_psc: the host may not move the end up nor touch the reserved word."""
    host.psc = _header(host, *header)
    assert terminated(host) == (1, 1)


def test_page_state_may_not_go_backwards(host: ScriptedHost) -> None:
    """Linux, vmgexit_psc: progress that is taken back ends the guest."""
    steps = [_header(host, 3, 5), _header(host, 2, 5)]
    host.psc = lambda event: steps.pop(0)(event)
    assert terminated(host) == (1, 1)
    assert steps == []


def test_more_pages_than_a_descriptor_holds(host: ScriptedHost) -> None:
    """GHCB 2.0: at most 253 entries fit; more pages need more requests."""
    guest = host.boot()
    host.events.clear()
    host.psc_entries.clear()
    host.run(share_pages(guest.ghcbs[0], [gpa << 12 for gpa in range(1000, 1254)]))
    assert len(host.events) == 2
    assert host.psc_entries == [2 << 52 | gpa << 12 for gpa in range(1000, 1254)]


# secrets and CPUID page


@pytest.mark.parametrize(("version", "fails"), [(0, True), (1, True), (2, False), (3, False), (4, False)])
def test_secrets_page_version(host: ScriptedHost, version: int, fails: bool) -> None:
    """AMD 56860, secrets page: consumers take version 2 and later; Linux ends the guest with set 1 code 6."""
    host.memory.private[SECRETS : SECRETS + 4] = struct.pack("<I", version)
    if fails:
        assert terminated(host) == (1, 6)
    else:
        assert host.boot().secrets.version == version


@pytest.mark.parametrize(("count", "fails"), [(0, False), (64, False), (65, True)])
def test_cpuid_page_count(host: ScriptedHost, count: int, fails: bool) -> None:
    """AMD 56860, CPUID page: at most 64 functions; Linux ends the guest with set 1 code 4."""
    host.memory.private[CPUID : CPUID + 4] = struct.pack("<I", count)
    if fails:
        assert terminated(host) == (1, 4)
    else:
        assert host.boot().version == 2


def test_no_cpuid_page(host: ScriptedHost) -> None:
    """A layout without CPUID page reads none."""
    layout = GuestLayout(
        secrets_page=SECRETS,
        cpuid_page=0,
        ghcb_pages=(0x3000,),
        request_page=0x5000,
        response_page=0x6000,
        certs_buffer=0x8000,
    )
    host.memory.private[0:4] = b"\xff" * 4
    assert host.run(boot(host.cpu, layout)).layout is layout


@pytest.mark.parametrize(
    ("size", "vmpl", "caa", "wanted"),
    [(0x1000, 1, 0x7000, 1), (0x1000, 3, 0, 3), (0, 2, 1, 0), (0x1000, 0, 0, (1, 8)), (0x1000, 2, 1, (1, 9))],
)
def test_privilege_level_comes_from_the_svsm(
    host: ScriptedHost, size: int, vmpl: int, caa: int, wanted: int | tuple[int, int]
) -> None:
    """GHCB 2.0, secrets page OS area 2: an SVSM says at which VMPL the guest runs; else it is VMPL0."""
    struct.pack_into("<QQQIB", host.memory.private, SECRETS + 0x140, 0, size, caa, 1, vmpl)
    if isinstance(wanted, tuple):
        assert terminated(host) == wanted
    else:
        assert host.boot().vmpl == wanted


def test_refused_access_passes_through(host: ScriptedHost) -> None:
    """A nested page fault is the processor's to report: boot does not swallow it."""
    host.memory.shared_pages.add(SECRETS)
    with pytest.raises(GuestAccessFault):
        host.boot()


# further vCPUs


def test_ap_registers_its_own_ghcb(host: ScriptedHost, second_cpu: FakeCpu) -> None:
    """GHCB 2.0: every vCPU registers a GHCB of its own before the first use."""
    guest = host.boot()
    host.msr_requests.clear()
    ghcb = host.run(boot_ap(second_cpu, guest, vcpu=1), second_cpu)
    assert host.msr_requests == [0x0020000000004014, 0x4012]
    assert guest.ghcbs[1] is ghcb
    assert guest.ghcb_of(second_cpu) is ghcb
    assert guest.ghcb_of(host.cpu) is not ghcb


def test_ap_registration_refused(host: ScriptedHost, second_cpu: FakeCpu) -> None:
    """GHCB 2.0: the answer must echo the GFN, for an AP too."""
    guest = host.boot()
    host.msr_replies[0x012] = 0x3013
    with pytest.raises(GuestTerminated, match="set 1 code 0"):
        host.run(boot_ap(second_cpu, guest, vcpu=1), second_cpu)
    assert guest.ghcb_of(second_cpu) is None


@pytest.mark.parametrize("vcpu", [2, -1])
def test_vcpu_without_ghcb_page(host: ScriptedHost, second_cpu: FakeCpu, vcpu: int) -> None:
    """The layout says how many vCPUs can have a GHCB."""
    guest = host.boot()
    with pytest.raises(UsageError, match="wanted one of the 2"):
        host.run(boot_ap(second_cpu, guest, vcpu=vcpu), second_cpu)


def test_start_ap(host: ScriptedHost) -> None:
    """GHCB 2.0, AP creation: info 1 = APIC id and request 1, info 2 = VMSA, RAX = its SEV_FEATURES."""
    guest = host.boot()
    host.events.clear()
    host.memory.calls.clear()
    vmsa = bytearray(4096)
    struct.pack_into("<Q", vmsa, Vmsa.offset_of("sev_features"), 0x21)
    place_vmsa(host.cpu, VMSA, bytes(vmsa))
    host.run(start_ap(host.cpu, guest.ghcbs[0], 5, VMSA))
    assert host.memory.calls == [("pvalidate", VMSA, True), ("rmpadjust", VMSA, 1, 0, True)]
    (event,) = host.events
    assert (event.code, event.info1, event.info2) == (0x80000013, 5 << 32 | 1, VMSA)
    assert (event.rax, event.rbx) == (0x21, None)


def test_start_ap_refused_by_the_host(host: ScriptedHost) -> None:
    """KVM: an unknown APIC id or unfit features are answered with info 1 = 2, info 2 = 5."""
    guest = host.boot()
    host.reply(2, 5)
    with pytest.raises(ApRefused, match="APIC id 9"):
        host.run(start_ap(host.cpu, guest.ghcbs[0], 9, VMSA))


def test_start_ap_refused_by_the_processor(host: ScriptedHost) -> None:
    """AMD 24594: RMPADJUST fails with a code in EAX; the host is not asked then."""
    guest = host.boot()
    host.events.clear()
    host.memory.rmpadjust_code = 2
    with pytest.raises(ApRefused, match="RMPADJUST 2"):
        host.run(start_ap(host.cpu, guest.ghcbs[0], 1, VMSA))
    assert host.events == []


def test_place_vmsa_refusals(host: ScriptedHost) -> None:
    """A VMSA is one page, and the page has to be accepted first."""
    with pytest.raises(LayoutError, match="got 4095 bytes"):
        place_vmsa(host.cpu, VMSA, bytes(4095))
    host.memory.pvalidate_code = 1
    with pytest.raises(ApRefused, match="PVALIDATE 1"):
        place_vmsa(host.cpu, VMSA, bytes(4096))
