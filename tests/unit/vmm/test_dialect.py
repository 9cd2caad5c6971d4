"""The generations of the certificate exit, byte for byte, and how the kernel is asked which one it speaks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.kvm import VCPU_MMAP_SIZE, Capability
from swsnp.errors import UsageError
from swsnp.vmm.dialect import COCO_V1, DIALECTS, NO_CERT_EXIT, REQ_CERTS, named, probe

if TYPE_CHECKING:
    from tests.unit.vmm.fake_host import FakeHost

    from swsnp.vmm.dialect import Dialect


def run_area(**at: str) -> memoryview:
    """A vCPU mapping with hexadecimal bytes at offsets: `at_40="00F407"`."""
    area = bytearray(VCPU_MMAP_SIZE)
    for key, text in at.items():
        offset, data = int(key[3:]), bytes.fromhex(text)
        area[offset : offset + len(data)] = data
    return memoryview(area)


def test_reads_the_series_exit() -> None:
    """KVM_EXIT_COCO (June 2024): gfn at 40, 32-bit npages at 48; the address is gfn << 12."""
    area = run_area(at_8="28", at_40="00F4070000000000", at_48="04000000", at_52="EEEEEEEE")
    assert COCO_V1.request(area) == (0x7F400000, 4)


def test_reads_the_upstream_exit() -> None:
    """Linux, kvm.h, KVM_EXIT_SNP_REQ_CERTS: gpa at 32, 64-bit npages at 40."""
    area = run_area(at_8="2B", at_32="0000407F00000000", at_40="0400000001000000")
    assert REQ_CERTS.request(area) == (0x7F400000, 1 << 32 | 4)


@pytest.mark.parametrize(
    ("dialect", "at", "result", "expected"),
    [
        (COCO_V1, 52, 0, "00000000"),
        (COCO_V1, 52, COCO_V1.failure, "00000080"),
        (COCO_V1, 52, COCO_V1.too_small, "01000000"),
        (REQ_CERTS, 48, 0, "0000000000000000"),
        (REQ_CERTS, 48, REQ_CERTS.failure, "0500000000000000"),
        (REQ_CERTS, 48, REQ_CERTS.too_small, "1C00000000000000"),
        (REQ_CERTS, 48, REQ_CERTS.retry, "0B00000000000000"),
    ],
)
def test_writes_results_and_nothing_else(dialect: Dialect, at: int, result: int, expected: str) -> None:
    """ret: 32 bits at 52 with 0, 1, 1 << 31 in the series; 64 bits at 48 with errno values upstream."""
    area = memoryview(bytearray(b"\xee" * VCPU_MMAP_SIZE))
    dialect.put_result(area, result)
    data = bytes.fromhex(expected)
    assert area[at : at + len(data)] == data
    assert area[:at] == b"\xee" * at
    assert area[at + len(data) :] == b"\xee" * (VCPU_MMAP_SIZE - at - len(data))


def test_needed_pages_of_the_series() -> None:
    """KVM_EXIT_COCO: too small is ret 1 with the needed count in 32 bits; a larger one is not cut."""
    area = run_area()
    assert COCO_V1.put_needed(area, 0x01020304)
    assert bytes(area[48:56]).hex() == "0403020101000000"
    assert not COCO_V1.put_needed(area, 1 << 32)
    assert bytes(area[48:56]).hex() == "0403020101000000"


def test_needed_pages_upstream() -> None:
    """KVM_EXIT_SNP_REQ_CERTS: ENOSPC with the needed count in the 64-bit npages."""
    area = run_area()
    assert REQ_CERTS.put_needed(area, 1 << 32)
    assert bytes(area[40:56]).hex() == "0000000001000000" + "1c00000000000000"


def test_sub_types_of_the_series() -> None:
    """KVM_EXIT_COCO: only nr 0 asks for certificates; upstream's exit has no sub-types."""
    assert COCO_V1.is_request(run_area(at_33="EEEEEEEEEEEEEE"))
    assert not COCO_V1.is_request(run_area(at_32="01"))
    assert REQ_CERTS.is_request(run_area(at_32="01"))


def test_names() -> None:
    """Every kernel profile has a dialect; the revised series changed nothing here."""
    assert {name: dialect.exit_reason for name, dialect in DIALECTS.items()} == {
        "coco-v1": 40,
        "coco-v1-revised": 40,
        "linux-7.2": 43,
        "linux-6.12": None,
    }
    assert named("coco-v1-revised") is COCO_V1
    with pytest.raises(UsageError, match="got 'linux-5', wanted one of coco-v1"):
        named("linux-5")


@pytest.mark.parametrize(
    ("attributes", "extensions", "expected"),
    [
        ({(1, 2): 1}, {}, REQ_CERTS),
        ({(1, 2): 1}, {Capability.EXIT_COCO: 1}, REQ_CERTS),
        ({(1, 2): 0}, {}, NO_CERT_EXIT),
        ({(1, 1): 1}, {}, NO_CERT_EXIT),
        ({}, {}, NO_CERT_EXIT),
        ({}, {Capability.EXIT_COCO: 1}, NO_CERT_EXIT),
    ],
)
def test_probe(
    host: FakeHost,
    attributes: dict[tuple[int, int], int],
    extensions: dict[Capability, int],
    expected: Dialect,
) -> None:
    """Linux 7.2: attribute (1, 2) decides. Capability 237 alone never does: upstream uses it otherwise."""
    host.attributes, host.extensions = attributes, extensions
    kvm_fd = host.open("/dev/kvm")
    assert probe(host, kvm_fd) is expected
    assert host.memory == {}, "the probe's buffer is given back"


def test_probe_of_a_closed_descriptor(host: FakeHost) -> None:
    """Whatever error the question ends with, no exit is assumed."""
    assert probe(host, 99) is NO_CERT_EXIT
    assert host.memory == {}
