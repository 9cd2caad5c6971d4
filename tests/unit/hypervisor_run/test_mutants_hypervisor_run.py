"""Scratch areas that only one rule refuses."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.ghcb import ExitCode

if TYPE_CHECKING:
    from tests.unit.hypervisor_run.conftest import MakeWorld

DEVICE = 0xFED0_0000


@pytest.mark.parametrize("scratch", [0, (1 << 64) - 4, (1 << 64) - 8])
def test_scratch_areas_of_version_1_that_cannot_be(world: MakeWorld, scratch: int) -> None:
    """Linux, setup_vmgexit_scratch: 0 is no address, and the area must not wrap, wherever it may lie."""
    vm = world("linux-6.12")
    vm.sev.ghcb_version = 1
    assert vm.resumed(vm.ask_run(ExitCode.MMIO_WRITE, DEVICE, 8, scratch=scratch))
    assert vm.reply == (2, 3)


def test_the_last_scratch_area_of_version_1(world: MakeWorld) -> None:
    """Linux, setup_vmgexit_scratch: an area that ends before the last byte is refused for its memory only."""
    vm = world("linux-6.12")
    vm.sev.ghcb_version = 1
    assert vm.ask_run(ExitCode.MMIO_WRITE, DEVICE, 8, scratch=(1 << 64) - 9) == -errno.EFAULT
