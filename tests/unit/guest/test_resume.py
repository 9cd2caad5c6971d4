"""Going on at another host: what is asked again, what is registered again, and what is left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.errors import UsageError
from swsnp.guest.boot import resume, resume_ap
from swsnp.guest.terminate import GuestTerminated

if TYPE_CHECKING:
    from tests.unit.guest.conftest import FakeCpu, ScriptedHost


@pytest.mark.parametrize(
    ("code", "reply", "wanted"),
    [
        pytest.param(0x002, 0x002, (0, 0), id="no SEV information"),
        pytest.param(0x002, 0x0004000333000001, (0, 0), id="minimum 3"),
        pytest.param(0x002, 0x0001000133000001, (0, 1), id="the guest's version is not spoken here"),
        pytest.param(0x080, 0x2081, (0, 2), id="features without SNP"),
        pytest.param(0x012, 0xFFFFFFFFFFFFF013, (1, 0), id="registration refused"),
        pytest.param(0x012, 0x4013, (1, 0), id="another GFN registered"),
    ],
)
def test_a_host_that_cannot_run_the_guest(
    host: ScriptedHost, code: int, reply: int, wanted: tuple[int, int]
) -> None:
    """GHCB 2.0: a version is negotiated once, so a host that lacks it ends the guest; the rest as at boot."""
    host.msr_replies[code] = reply
    with pytest.raises(GuestTerminated) as caught:
        host.run(resume(host.cpu, host.layout, version=2))
    assert (caught.value.reason_set, caught.value.reason_code) == wanted
    assert host.msr_requests[-1] == 0x100 | wanted[0] << 12 | wanted[1] << 16


def test_no_ghcb_page_for_a_vcpu(host: ScriptedHost) -> None:
    """A vCPU beyond the layout is the caller's mistake, as at boot."""
    guest = host.boot()
    with pytest.raises(UsageError, match="vcpu: got 7"):
        host.run(resume_ap(host.cpu, guest, vcpu=7))


def test_shortest_trace(host: ScriptedHost) -> None:
    """Version, features and GHCB; no page changes its state, nothing in memory is written."""
    before = host.boot()
    host.memory.write(0x3000 + 0x400, b"as it was", private=False)
    host.msr_requests.clear()
    host.events.clear()
    host.memory.calls.clear()
    guest = host.run(resume(host.cpu, host.layout, version=2))
    assert host.msr_requests == [0x002, 0x080, 0x3012]
    assert host.events == []
    assert host.memory.calls == []
    assert host.memory.read(0x3000 + 0x400, 9, private=False) == b"as it was"
    assert (guest.version, guest.features, guest.vmpl) == (before.version, before.features, before.vmpl)
    assert guest.ghcb_of(host.cpu) is guest.ghcbs[0]
    assert guest.secrets.gpa == before.secrets.gpa


def test_further_vcpus(host: ScriptedHost, second_cpu: FakeCpu) -> None:
    """Each vCPU registers its own GHCB."""
    host.boot()
    guest = host.run(resume(host.cpu, host.layout, version=2))
    host.msr_requests.clear()
    ghcb = host.run(resume_ap(second_cpu, guest, vcpu=1), second_cpu)
    assert host.msr_requests == [0x4012]
    assert guest.ghcb_of(second_cpu) is ghcb
    assert ghcb.gpa == 0x4000
