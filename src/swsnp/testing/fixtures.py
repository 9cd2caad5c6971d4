"""Fixtures for pytest: a machine, a machine that repeats itself, a clock, a booted VM, a key service.

Not loaded by itself; put `pytest_plugins = ["swsnp.testing.fixtures"]` into the conftest.py at your root, or
run `pytest -p swsnp.testing.fixtures`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.machine import Machine
from swsnp.testing.clock import FakeClock

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.machine import VirtualMachine
    from swsnp.testing.kds import KdsServer

__all__ = ["swsnp_clock", "swsnp_kds", "swsnp_machine", "swsnp_seeded_machine", "swsnp_vm"]


@pytest.fixture
def swsnp_clock() -> FakeClock:
    """The clock of `swsnp_machine`: a guest that is told to come back waits no real time."""
    return FakeClock()


@pytest.fixture
def swsnp_machine(swsnp_clock: FakeClock) -> Machine:
    """A machine of its own for one test: Milan, today's KVM, keys nobody knows."""
    return Machine(clock=swsnp_clock)


@pytest.fixture(scope="session")
def swsnp_seeded_machine() -> Machine:
    """One machine for all tests, the same in every run.

    Its certificate keys are made once, which takes seconds. Its seed is in this file: never trust its root.
    """
    return Machine(seed=b"swsnp.testing.fixtures", clock=FakeClock())


@pytest.fixture
def swsnp_vm(swsnp_machine: Machine) -> Iterator[VirtualMachine]:
    """A booted VM of `swsnp_machine`, with the machine's own certificates."""
    with swsnp_machine.create_vm() as vm:
        vm.boot()
        yield vm


@pytest.fixture
def swsnp_kds(swsnp_seeded_machine: Machine) -> Iterator[KdsServer]:
    """A key service that knows `swsnp_seeded_machine`, on a free port of the loopback address.

    `swsnp_kds.url` is its address, `swsnp_kds.double` makes it misbehave and tells what was asked; programs
    in other languages do both over HTTP (`swsnp.amd_ca.kds_server`). Each test has one of its own.
    """
    from swsnp.testing.kds import KdsDouble, KdsServer

    swsnp_seeded_machine.hierarchy.chain_pem()  # its keys take seconds, once; no client should wait for that
    with KdsServer(KdsDouble([swsnp_seeded_machine]), control=True) as server:
        yield server
