"""A launch plan as a VMM carries it out: the same regions that are measured, as LAUNCH_UPDATE takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from swsnp.abi.snp_launch import CpuidPage
from swsnp.abi.snp_page import PAGE, PageType
from swsnp.errors import UsageError
from swsnp.measure.launch_plan import launch_plan
from swsnp.measure.vmsa_pages import SNP_ACTIVE, Vmm
from swsnp.vmm.config import LaunchPage, memory_map

if TYPE_CHECKING:
    from swsnp.measure.launch_plan import LaunchConfig, Region
    from swsnp.vmm.config import LaunchImage, VmConfig

__all__ = ["config_of_plan", "image_of_plan"]


def image_of_plan(plan: LaunchConfig) -> LaunchImage:
    """What the VMM hands to KVM, in order: everything but VMSA pages, which KVM makes of its vCPUs.

    Raises:
        LayoutError: as `launch_plan`.
        UsageError: as `launch_plan`, or a plan that this VMM does not carry out.
    """
    return tuple(_page(each) for each in launch_plan(plan) if each.page_type is not PageType.VMSA)


def _page(region: Region) -> LaunchPage:
    if region.page_type is PageType.CPUID:
        return LaunchPage(region.page_type, region.gpa, bytes(CpuidPage()))
    if region.data is not None:
        return LaunchPage(region.page_type, region.gpa, region.data[:])
    return LaunchPage(region.page_type, region.gpa, bytes(region.npages * PAGE))


def config_of_plan(config: VmConfig, plan: LaunchConfig) -> VmConfig:
    """The VM with what its plan decides: the registers that its vCPUs start with, and SEV_FEATURES.

    Raises:
        UsageError: another number of vCPUs, a plan of another VMM or with an SVSM or other registers, or a
            section outside the VM's memory.
    """
    if plan.vcpus != config.vcpus:
        raise UsageError(f"launch plan: got {plan.vcpus} vCPUs, wanted the VM's {config.vcpus}")
    if plan.vmm is not Vmm.QEMU or plan.svsm is not None or plan.vmsa_fields:
        raise UsageError("launch plan: got another VMM's, wanted QEMU's, without an SVSM or other registers")
    areas = memory_map(config.memory_size, ())
    for each in plan.firmware.launched_sections():
        if not any(gpa <= each.gpa and each.end <= gpa + size for gpa, size in areas):
            raise UsageError(
                f"SEV metadata {each.name}: got {each.gpa:#x}..{each.end:#x}, wanted it inside RAM of "
                f"{config.memory_size:#x} bytes"
            )
    return replace(
        config,
        cpu_signature=plan.signature,
        ap_reset_eip=plan.firmware.reset_eip,
        vmsa_features=plan.features & ~SNP_ACTIVE,  # KVM sets that bit, and refuses it from a VMM
    )
