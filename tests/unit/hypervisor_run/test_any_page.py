"""Whatever a guest and a VMM write, KVM answers with numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swsnp.abi.ghcb import ExitCode
from swsnp.hardware import Vmgexit
from swsnp.hypervisor.profiles import PROFILES

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld

PROFILE_NAMES = st.sampled_from(sorted(PROFILES))
WORD = st.one_of(
    st.integers(0, (1 << 64) - 1), st.sampled_from([0, 0x1000, 0x1800, 0x1FE8, 0x3000, 0x4000, 0x5000])
)
CODE = st.one_of(WORD, st.sampled_from([int(each) for each in ExitCode]))
QUICK = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@QUICK
@given(
    profile=PROFILE_NAMES,
    enable=st.booleans(),
    vm_type=st.sampled_from([0, 2, 3, 4]),
    page=st.binary(min_size=0, max_size=64),
    code=CODE,
    words=st.lists(WORD, min_size=7, max_size=7),
    valid=st.one_of(st.just((1 << 128) - 1), st.integers(0, (1 << 128) - 1)),
    answers=st.lists(WORD, min_size=3, max_size=3),
)
def test_any_ghcb(
    world: MakeWorld,
    profile: str,
    enable: bool,
    vm_type: int,
    page: bytes,
    code: int,
    words: list[int],
    valid: int,
    answers: list[int],
) -> None:
    """Random GHCB pages and random answers of userspace never raise; results are 0 or a small -errno."""
    vm = world(profile, enable=enable, vm_type=vm_type)
    vm.message(5)
    vm.page[:] = (page * (4096 // max(len(page), 1) + 1))[:4096].ljust(4096, b"\0")
    for offset, value in zip((0x1F8, 0x318, 0x308, 0x310, 0x398, 0x3A0, 0x3A8), words, strict=True):
        vm.put(offset, value)
    vm.put(0x390, code)
    vm.put(0x3F0, valid, 128)
    vm.put(0xFFC, 0, 32)
    vm.processor.ghcb_msr = vm.GHCB
    vm.processor.exits.append(Vmgexit())
    for answer in answers:
        assert -133 < vm.run() <= 0
        vm.poke(48, answer, 64)
        vm.poke(88, answer & 31, 64)


@QUICK
@given(profile=PROFILE_NAMES, vm_type=st.sampled_from([0, 3, 4]), msr=WORD | st.integers(0, 0xFFF), ret=WORD)
def test_any_msr(world: MakeWorld, profile: str, vm_type: int, msr: int, ret: int) -> None:
    """Random GHCB MSR values never raise, and leave the MSR a 64-bit value."""
    vm = world(profile, vm_type=vm_type)
    assert -133 < vm.ask_msr(msr) <= 0
    vm.poke(88, ret, 64)
    assert -133 < vm.run() <= 0
    assert 0 <= vm.processor.ghcb_msr < 1 << 64
