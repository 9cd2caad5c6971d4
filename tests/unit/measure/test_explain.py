"""A launch page by page, and where two launches part."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from swsnp.abi.ovmf import SectionType
from swsnp.abi.snp_launch import VMSA_GPA
from swsnp.abi.snp_page import PageType
from swsnp.measure.explain import explain, first_difference, pages
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.kernel_hashes import KernelHashes
from swsnp.measure.launch_plan import LaunchConfig, image_digest, launch_digest
from swsnp.measure.vmsa_pages import Vmm
from swsnp.testing.firmware_image import AMD_SEV, firmware_image

FIRMWARE = FirmwareVolume(firmware_image(text=b"code"))
BASE = (1 << 32) - 0x1_0000


def hashes(kernel: bytes = b"k", initrd: bytes = b"i", append: bytes = b"a") -> KernelHashes:
    return KernelHashes(hashlib.sha256(kernel).digest(), hashlib.sha256(initrd).digest(), append)


def config(firmware: FirmwareVolume = FIRMWARE, **given: Any) -> LaunchConfig:
    return LaunchConfig(firmware, **{"vcpus": 2, "signature": 0x800F12, **given})


def test_runs() -> None:
    """Every page or run of equal pages: type, GPA, how many, and the digest after it."""
    wanted = config()
    runs = list(explain(wanted))
    assert [(each.origin, each.page_type.name, each.gpa, each.npages) for each in runs] == [
        ("firmware image", "NORMAL", BASE, 1),
        ("firmware image", "NORMAL", BASE + 0x1000, 14),
        ("firmware image", "NORMAL", BASE + 0xF000, 1),
        ("section 0 (SNP_SEC_MEM)", "ZERO", 0x80_0000, 9),
        ("section 1 (SNP_SEC_MEM)", "ZERO", 0x80_A000, 3),
        ("section 2 (SNP_SECRETS)", "SECRETS", 0x80_D000, 1),
        ("section 3 (CPUID)", "CPUID", 0x80_E000, 1),
        ("section 4 (SVSM_CAA)", "ZERO", 0x80_F000, 1),
        ("section 5 (SNP_KERNEL_HASHES)", "ZERO", 0x81_0000, 1),
        ("section 6 (SNP_SEC_MEM)", "ZERO", 0x81_1000, 15),
        ("vCPU 0", "VMSA", VMSA_GPA, 1),
        ("vCPU 1", "VMSA", VMSA_GPA, 1),
    ]
    assert runs[2].digest == image_digest(FIRMWARE)
    assert runs[-1].digest == launch_digest(wanted)
    assert runs[1].contents == hashlib.sha384(b"\xff" * 4096).digest()


def test_pages_are_counted() -> None:
    """Pages are numbered from 0 over the whole launch."""
    found = list(pages(config(vcpus=3)))
    assert [each.number for each in found] == list(range(len(found)))
    assert [each.origin for each in found[-3:]] == ["vCPU 0", "vCPU 1", "vCPU 2"]


def test_no_difference() -> None:
    """EC2's order does not matter when the CPUID page is the last section anyway."""
    sections = [each for each in AMD_SEV[:4] if each[2] != SectionType.SNP_SEC_MEM]
    firmware = FirmwareVolume(firmware_image(sections=sections))
    first, second = (config(firmware, vmm=Vmm.QEMU, vcpus=0), config(firmware, vmm=Vmm.EC2, vcpus=0))
    assert first_difference(first, second) is None
    assert launch_digest(first) == launch_digest(second)


@pytest.mark.parametrize(
    ("first", "second", "origin", "reasons"),
    [
        ({}, {"signature": 0xA00F11}, "vCPU 0", ["VMSA field rdx: 0x800f12, 0xa00f11"]),
        ({}, {"features": 0x21}, "vCPU 0", ["VMSA field sev_features: 0x1, 0x21"]),
        (
            {"vmm": Vmm.QEMU},
            {"vmm": Vmm.GCE},
            "section 0 (SNP_SEC_MEM)",
            ["type: ZERO, UNMEASURED"],
        ),
        (
            {"vmm": Vmm.QEMU},
            {"vmm": Vmm.EC2},
            "section 3 (CPUID)",
            [
                "origin: section 3 (CPUID), section 4 (SVSM_CAA)",
                "type: CPUID, ZERO",
                "gpa: 0x80e000, 0x80f000",
            ],
        ),
        ({}, {"hashes": hashes()}, "section 5 (SNP_KERNEL_HASHES)", ["type: ZERO, NORMAL"]),
        ({"vcpus": 1}, {"vcpus": 3}, None, ["only the second goes on, with vCPU 1"]),
        ({"vcpus": 3}, {"vcpus": 1}, "vCPU 1", ["only the first goes on, with vCPU 1"]),
    ],
)
def test_reasons(
    first: dict[str, Any], second: dict[str, Any], origin: str | None, reasons: list[str]
) -> None:
    """The first page that differs, and why: field of the VMSA, section, type, order or number."""
    found = first_difference(config(**first), config(**second))
    assert found is not None
    assert (found.first.origin if found.first else None) == origin
    assert list(found.reasons) == reasons


@pytest.mark.parametrize("name", ["kernel", "initrd", "append"])
def test_which_hash(name: str) -> None:
    """A page of kernel hashes says which of the three differs."""
    one, other = hashes(), hashes(**{name: b"other"})
    found = first_difference(config(hashes=one), config(hashes=other))
    assert found is not None
    field = "cmdline" if name == "append" else name
    a, b = (getattr(each, field).hex() for each in (one, other))
    assert found.reasons == (f"SHA-256 of {field}: {a}, {b}",)


def test_hashes_elsewhere() -> None:
    """The same hashes at another place of the page."""
    moved = FirmwareVolume(firmware_image(text=b"code", hash_table=(0x81_0800, 0x400)))
    first, second = config(hashes=hashes()), config(moved, hashes=hashes())
    found = next(
        pair
        for pair in zip(pages(first), pages(second), strict=True)
        if "HASHES" in pair[0].origin and pair[0].contents != pair[1].contents
    )
    from swsnp.measure.explain import differences

    assert list(differences(*found)) == ["hash table base: page offset 0xc00, 0x800"]


def test_image_bytes() -> None:
    """Of an image, the page and the first byte in it."""
    other = bytearray(FIRMWARE.image)
    other[0x2010:0x2012] = b"\x12\x34"
    found = first_difference(config(), config(FirmwareVolume(bytes(other))))
    assert found is not None
    assert found.number == 2
    assert found.reasons == ("bytes: from 0x10 of the page on, ffffffffffffffff, 1234ffffffffffff",)


def test_image_of_another_size() -> None:
    """Images of two sizes part at their first page."""
    found = first_difference(config(), config(FirmwareVolume(firmware_image(size=0x2_0000, text=b"code"))))
    assert found is not None
    assert found.number == 0
    assert found.reasons == (f"gpa: {BASE:#x}, {BASE - 0x1_0000:#x}",)
    assert found.first is not None
    assert found.first.page_type is PageType.NORMAL
