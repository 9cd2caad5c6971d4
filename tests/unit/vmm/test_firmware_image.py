"""A launch plan as the VMM carries it out."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest

from swsnp.abi.snp_launch import CpuidPage
from swsnp.abi.snp_page import PageType
from swsnp.errors import UsageError
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.kernel_hashes import KernelHashes
from swsnp.measure.launch_plan import LaunchConfig, launch_plan
from swsnp.measure.svsm import Svsm
from swsnp.measure.vmsa_pages import Vmm
from swsnp.testing.firmware_image import AP_RESET_EIP, firmware_image
from swsnp.vmm.config import VmConfig
from swsnp.vmm.firmware_image import config_of_plan, image_of_plan

FIRMWARE = FirmwareVolume(firmware_image())
HASHES = KernelHashes(hashlib.sha256(b"kernel").digest())


def plan(**given: Any) -> LaunchConfig:
    return LaunchConfig(FIRMWARE, **{"vcpus": 2, "signature": 0xA00F11, **given})


def test_image_is_the_plan() -> None:
    """What is launched is what is measured: type, place, order and bytes, VMSA pages aside."""
    wanted = plan(hashes=HASHES)
    regions = [each for each in launch_plan(wanted) if each.page_type is not PageType.VMSA]
    image = image_of_plan(wanted)
    assert [(each.type, each.gpa, len(each.data)) for each in image] == [
        (each.page_type, each.gpa, each.npages * 4096) for each in regions
    ]
    assert image[0].data == FIRMWARE.image
    assert image[6].data == HASHES.page(0x81_0C00)
    assert not any(image[1].data + image[3].data)
    assert image[4].data == bytes(CpuidPage())


def test_vm_of_a_plan() -> None:
    """Signature, start of the APs and SEV_FEATURES are the plan's; KVM sets SNP_ACTIVE itself."""
    config = config_of_plan(VmConfig(vcpus=2, name="x"), plan(features=0x201))
    assert config == VmConfig(
        vcpus=2, name="x", cpu_signature=0xA00F11, ap_reset_eip=AP_RESET_EIP, vmsa_features=0x200
    )


@pytest.mark.parametrize("missing", [0, 4096])
def test_memory_that_ends_before_the_last_section(missing: int) -> None:
    """Every section is launched into RAM; one that ends beyond it is named, one that ends with it is not."""
    last = max(FIRMWARE.launched_sections(), key=lambda section: section.end)
    config = VmConfig(vcpus=2, memory_size=last.end - missing)
    if missing:
        text = rf"SEV metadata section 6 \(SNP_SEC_MEM\): got .*\.\.{last.end:#x}, wanted it"
        with pytest.raises(UsageError, match=text):
            config_of_plan(config, plan())
    else:
        assert config_of_plan(config, plan()).memory_size == last.end


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"vcpus": 3}, "got 3 vCPUs, wanted the VM's 2"),
        ({"vmm": Vmm.EC2}, "wanted QEMU's"),
        ({"vmsa_fields": {"rip": 0}}, "wanted QEMU's"),
        ({"svsm": Svsm(firmware_image(), firmware=FIRMWARE, vars_size=4096)}, "wanted QEMU's"),
    ],
)
def test_other_plans(given: dict[str, Any], text: str) -> None:
    """A plan that this VMM would not carry out as it is measured."""
    with pytest.raises(UsageError, match=f"launch plan: .*{text}"):
        config_of_plan(VmConfig(vcpus=2), plan(**given))
