"""The scripted host kernel, and VMs launched on it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.unit.vmm.fake_host import FakeHost


def _fake_host_class() -> Any:
    """The class in fake_host.py, loaded once, by path: tests are not a package."""
    name = "swsnp_tests_vmm_fake_host"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("fake_host.py"))
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name].FakeHost


@pytest.fixture
def host() -> FakeHost:
    """A host kernel with SNP whose vCPUs are idle."""
    made: FakeHost = _fake_host_class()()
    return made


class Clock:
    """A clock that only `sleep` moves; `at_sleep` runs at every sleep."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []
        self.at_sleep: list[Any] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        if self.at_sleep:
            self.at_sleep.pop(0)()


@pytest.fixture
def clock() -> Clock:
    return Clock()
