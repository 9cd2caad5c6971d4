"""What a launch consists of, in its order: the one list that is measured, explained, and really launched.

1. an SVSM's firmware and image, or the firmware image alone, page by page;
2. the sections of the SEV metadata, in table order (EC2: CPUID pages after all others);
3. one VMSA page per vCPU.

Source: AMD 56860, SNP_LAUNCH_UPDATE; QEMU, target/i386/sev.c; sev-snp-measure 0.0.13, bit for bit.
"""

from __future__ import annotations

from swsnp.abi.ovmf import SectionType
from swsnp.abi.snp_page import PAGE, VMSA_GPA, PageType
from swsnp.errors import UsageError
from swsnp.measure.digest import extend_equal, extend_range, page_contents
from swsnp.measure.vmsa_pages import RESET_EIP, SNP_ACTIVE, Vmm, reset_page, svsm_page, with_fields

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from mmap import mmap
    from typing import Final

    from swsnp.abi.ovmf import Section
    from swsnp.measure.firmware_volume import FirmwareVolume
    from swsnp.measure.kernel_hashes import KernelHashes
    from swsnp.measure.svsm import Svsm

__all__ = ["LaunchConfig", "Region", "image_digest", "launch_digest", "launch_plan", "vmsa_regions"]

_INITIAL: Final = bytes(48)
_ONE_PAGE: Final = frozenset({PageType.SECRETS, PageType.CPUID})
_SECTION_PAGES: Final[Mapping[SectionType, PageType]] = {
    SectionType.SNP_SEC_MEM: PageType.ZERO,
    SectionType.SNP_SECRETS: PageType.SECRETS,
    SectionType.CPUID: PageType.CPUID,
    SectionType.SVSM_CAA: PageType.ZERO,
    SectionType.SNP_KERNEL_HASHES: PageType.ZERO,
}


class LaunchConfig:
    """One guest: everything that decides its measurement.

    Args:
        firmware: its firmware.
        vcpus: how many processors; 0 gives the digest before the first VMSA.
        signature: CPUID Fn1 EAX of the CPU model; only QEMU's guests depend on it.
        vmm: who starts it.
        features: SEV_FEATURES.
        hashes: kernel, initial RAM disk and command line, where the VMM hands hashes over.
        svsm: an SVSM that starts in the firmware's place; the kernel is then not measured.
        vmsa_fields: registers that this VMM or host kernel sets otherwise, in every VMSA page.
        allow_no_metadata: take an image without SEV metadata for one that launches nothing but itself.

    Raises:
        UsageError: a configuration that no VMM has.
    """

    __slots__ = (
        "allow_no_metadata",
        "features",
        "firmware",
        "hashes",
        "signature",
        "svsm",
        "vcpus",
        "vmm",
        "vmsa_fields",
    )

    def __init__(
        self,
        firmware: FirmwareVolume,
        *,
        vcpus: int,
        signature: int = 0,
        vmm: Vmm = Vmm.QEMU,
        features: int = SNP_ACTIVE,
        hashes: KernelHashes | None = None,
        svsm: Svsm | None = None,
        vmsa_fields: Mapping[str, int] | None = None,
        allow_no_metadata: bool = False,
    ) -> None:
        if vcpus < 0:
            raise UsageError(f"vCPUs: got {vcpus}, wanted at least 0")
        if svsm is not None and vmm is not Vmm.QEMU:
            raise UsageError(f"SVSM: got VMM {vmm.value}, wanted {Vmm.QEMU.value}")
        if svsm is not None and hashes is not None:
            raise UsageError("SVSM: got kernel hashes, wanted none: an SVSM's launch does not measure them")
        self.firmware, self.vcpus, self.signature, self.vmm = firmware, vcpus, signature, vmm
        self.features, self.hashes, self.svsm = features, hashes, svsm
        self.vmsa_fields, self.allow_no_metadata = vmsa_fields or {}, allow_no_metadata


class Region:
    """`npages` pages of one type that come from one place.

    Attributes:
        origin: where it comes from, for people; `page_origin` says it of one page.
        page_type: PAGE_TYPE.
        gpa: of its first page. The VMSA pages of a region all lie at the same one.
        npages: how many pages.
        data: their bytes. VMSA: the page that is the same for all. None: zeros, which do not count.
        first: number of the first vCPU.
    """

    __slots__ = ("data", "first", "gpa", "npages", "origin", "page_type")

    def __init__(
        self,
        origin: str,
        page_type: PageType,
        gpa: int,
        npages: int,
        data: bytes | mmap | None = None,
        *,
        first: int = 0,
    ) -> None:
        self.origin, self.page_type, self.gpa, self.npages, self.data = origin, page_type, gpa, npages, data
        self.first = first

    def extend(self, digest: bytes) -> bytes:
        """The launch digest after this region."""
        if self.data is not None and self.page_type is PageType.NORMAL:
            return extend_range(digest, self.data, page_type=self.page_type, gpa=self.gpa)
        contents = page_contents(self.page_type, self.page(0))
        step = 0 if self.page_type is PageType.VMSA else PAGE
        return extend_equal(digest, contents, self.npages, page_type=self.page_type, gpa=self.gpa, step=step)

    def page(self, number: int) -> bytes:
        """One page's bytes."""
        if self.data is None:
            return bytes(PAGE)
        at = 0 if self.page_type is PageType.VMSA else number * PAGE
        return self.data[at : at + PAGE]

    def page_gpa(self, number: int) -> int:
        """One page's GPA."""
        return self.gpa if self.page_type is PageType.VMSA else self.gpa + number * PAGE

    def page_origin(self, number: int) -> str:
        """Where one page comes from: a VMSA page, from a vCPU with a number."""
        return f"{self.origin} {self.first + number}" if self.page_type is PageType.VMSA else self.origin

    def __repr__(self) -> str:
        return f"Region({self.origin}, {self.page_type.name}, {self.gpa:#x}, {self.npages})"


def launch_plan(config: LaunchConfig) -> Iterator[Region]:
    """The launch in its order; the first region is the firmware image.

    Raises:
        LayoutError: an image, or its tables, that cannot be launched.
        UsageError: a kernel for a firmware that does not look for hashes.
    """
    firmware, svsm = config.firmware, config.svsm
    yield _whole("firmware image", firmware)
    if svsm is not None:
        image = svsm.volume.image
        yield Region("SVSM image", PageType.NORMAL, svsm.gpa, len(image) // PAGE, image)
        sections = svsm.launched_sections(allow_no_metadata=config.allow_no_metadata)
    else:
        sections = firmware.launched_sections(allow_no_metadata=config.allow_no_metadata)
    if config.hashes is not None and all(each.type is not SectionType.SNP_KERNEL_HASHES for each in sections):
        firmware.hash_table_gpa()
        raise UsageError(
            "kernel hashes: the SEV metadata has no section of type SNP_KERNEL_HASHES, wanted one: nothing "
            "would measure the kernel (EDK II, AmdSev)"
        )
    for section in _in_order(sections, config.vmm):
        yield _of_section(section, config)
    yield from vmsa_regions(config)


def _whole(origin: str, volume: FirmwareVolume) -> Region:
    volume.check_pages()
    return Region(origin, PageType.NORMAL, volume.gpa, len(volume.image) // PAGE, volume.image)


def _in_order(sections: Iterable[Section], vmm: Vmm) -> Iterable[Section]:
    if vmm is Vmm.EC2:
        return sorted(sections, key=lambda section: section.type is SectionType.CPUID)
    return sections


def _of_section(section: Section, config: LaunchConfig) -> Region:
    kind = _SECTION_PAGES[section.type]
    if section.type is SectionType.SNP_KERNEL_HASHES and config.hashes is not None:
        page = config.firmware.hash_page(section, config.hashes)
        return Region(section.name, PageType.NORMAL, section.gpa, 1, page)
    if section.type is SectionType.SNP_SEC_MEM and config.vmm is Vmm.GCE:
        kind = PageType.UNMEASURED
    npages = 1 if kind in _ONE_PAGE else section.size // PAGE
    return Region(section.name, kind, section.gpa, npages)


def vmsa_regions(config: LaunchConfig) -> Iterator[Region]:
    """The VMSA pages: the boot processor's, and the others' together, since they are all the same."""
    first, others = _vmsa_pages(config)
    if config.vcpus and first == others:
        yield _vmsa(0, config.vcpus, first)
    elif config.vcpus:
        yield _vmsa(0, 1, first)
        if config.vcpus > 1:
            yield _vmsa(1, config.vcpus - 1, others)


def _vmsa(first: int, count: int, page: bytes) -> Region:
    return Region("vCPU", PageType.VMSA, VMSA_GPA, count, page, first=first)


def _vmsa_pages(config: LaunchConfig) -> tuple[bytes, bytes]:
    features, signature = config.features, config.signature
    if config.svsm is not None:
        first = others = svsm_page(rip=config.svsm.entry, features=features, signature=signature)
    else:
        first, others = (
            reset_page(config.vmm, eip=eip, features=features, signature=signature)
            for eip in (RESET_EIP, config.firmware.reset_eip)
        )
    if config.vmsa_fields:
        first, others = with_fields(first, config.vmsa_fields), with_fields(others, config.vmsa_fields)
    return first, others


def image_digest(firmware: FirmwareVolume) -> bytes:
    """The launch digest after the firmware image alone: 48 bytes.

    Raises:
        LayoutError: not whole pages.
    """
    return _whole("firmware image", firmware).extend(_INITIAL)


def launch_digest(config: LaunchConfig, *, after_image: bytes | None = None) -> bytes:
    """The launch digest, 48 bytes; errors as `launch_plan`.

    Args:
        config: the guest.
        after_image: `image_digest` of the firmware, if it is known; of the firmware itself only the tables at
            its end are then read.

    Raises:
        UsageError: `after_image` is not 48 bytes, or is given with an SVSM.
    """
    regions = launch_plan(config)
    digest = _INITIAL
    if after_image is not None:
        if len(after_image) != len(_INITIAL):
            raise UsageError(f"digest of the firmware image: got {len(after_image)} bytes, wanted 48")
        if config.svsm is not None:
            raise UsageError("digest of the firmware image: got one with an SVSM, wanted the firmware")
        next(regions)
        digest = after_image
    for region in regions:
        digest = region.extend(digest)
    return digest
