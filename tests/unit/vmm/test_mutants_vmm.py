"""Limits of the VMM's own checks, one on either side, and refusals that another would have hidden."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.kvm import Capability, Ioctl
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import IdAuth
from swsnp.errors import UsageError
from swsnp.trace import Trace
from swsnp.vmm.certs import Blob, BytesSource, CallableSource, TooLarge
from swsnp.vmm.config import LaunchPage, VmConfig, memory_map
from swsnp.vmm.host import PAGE, device_attribute
from swsnp.vmm.launch import LaunchError, launch
from swsnp.vmm.ram import Converted, GuestRam, Refused

if TYPE_CHECKING:
    from tests.unit.vmm.fake_host import FakeHost

MIB = 1 << 20


@pytest.mark.parametrize(
    "changes",
    [
        {"reduced_phys_bits": 63},
        {"memory_size": PAGE},
        {"policy": 0},
        {"policy": (1 << 64) - 1},
        {"id_auth": bytes(IdAuth.SIZE)},
    ],
)
def test_the_last_values_that_are_taken(changes: dict[str, Any]) -> None:
    """`VmConfig`: the ends of each range belong to it. QEMU: reduced-phys-bits is 1..63."""
    assert VmConfig(**changes) is not None


def test_a_negative_policy_is_refused() -> None:
    """KVM_SEV_SNP_LAUNCH_START: policy is an unsigned 64-bit word."""
    with pytest.raises(UsageError, match="policy: got -0x1, wanted 64 bits"):
        VmConfig(policy=-1)


def test_a_negative_address_is_refused() -> None:
    """A launch page has a guest physical address."""
    with pytest.raises(UsageError, match="launch page: gpa -0x1000"):
        LaunchPage(PageType.NORMAL, -PAGE, bytes(PAGE))


def test_flash_may_begin_where_memory_ends() -> None:
    """`memory_map`: the flash reaches from its lowest page to 4 GiB, and that may be the first after RAM."""
    page = LaunchPage(PageType.NORMAL, MIB, bytes(PAGE))
    assert memory_map(MIB, (page,)) == ((0, MIB), (MIB, (4 << 30) - MIB))


def test_a_callable_that_fills_the_room() -> None:
    """GHCB 2.0, SNP Extended Guest Request: certificates of exactly the room offered fit."""
    source = CallableSource(lambda: b"x" * PAGE)
    assert source.acquire(PAGE) == Blob(b"x" * PAGE)
    assert source.acquire(PAGE - 1) == TooLarge(PAGE)


@pytest.mark.parametrize(("refused", "attempts"), [("HAS", 1), ("GET", 2)])
def test_an_attribute_that_the_kernel_does_not_know(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, refused: str, attempts: int
) -> None:
    """Linux, KVM_HAS_DEVICE_ATTR: only what it admits is fetched; what cannot be fetched is not known."""
    asked = []

    def ioctl(fd: int, request: int, arg: int | bytearray | memoryview = 0) -> int:
        del fd, arg
        asked.append(request)
        return -errno.ENXIO if Ioctl(request).name == f"KVM_{refused}_DEVICE_ATTR" else 0

    monkeypatch.setattr(host, "ioctl", ioctl)
    assert device_attribute(host, 3, 0) is None
    assert len(asked) == attempts
    assert host.memory == {}


def test_the_series_exit_cannot_be_enabled(host: FakeHost) -> None:
    """KVM_ENABLE_CAP(KVM_CAP_EXIT_COCO) that fails ends the launch: the guest would get no certificates."""
    host.extensions[Capability.EXIT_COCO] = 1
    host.answers["KVM_ENABLE_CAP 237 0x1"] = -errno.EINVAL
    config = VmConfig(memory_size=MIB, certs=BytesSource(b"table"))
    with pytest.raises(LaunchError, match=r"KVM_ENABLE_CAP\(EXIT_COCO\): -EINVAL"):
        launch(host, config, (), dialect="coco-v1")
    assert host.open_fds == set()


def test_a_range_ends_with_the_address_space(host: FakeHost) -> None:
    """KVM_HC_MAP_GPA_RANGE: a range that ends at 2^64 does not wrap, one page more does."""
    ram = GuestRam(host, 3, (), vm="vm", trace=Trace())
    top = (1 << 64) - PAGE
    assert ram.convert(top, 1, private=False) == Converted(in_memory=False)
    assert ram.convert(top, 2, private=False) == Refused(errno.EINVAL)
