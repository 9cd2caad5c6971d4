"""What a launch consists of, in its order, and its digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.ovmf import SectionType
from swsnp.abi.snp_launch import VMSA_GPA
from swsnp.abi.snp_page import PageType
from swsnp.errors import LayoutError, UsageError
from swsnp.measure.digest import extend, page_contents
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.kernel_hashes import KernelHashes
from swsnp.measure.launch_plan import LaunchConfig, Region, image_digest, launch_digest, launch_plan
from swsnp.measure.legacy import sev_digest, sev_es_digest
from swsnp.measure.svsm import Svsm
from swsnp.measure.vmsa_pages import CPU_SIGNATURES, RESET_EIP, Vmm, reset_page, svsm_page
from swsnp.testing.firmware_image import AMD_SEV, AP_RESET_EIP, firmware_image

if TYPE_CHECKING:
    from pathlib import Path

EPYC = CPU_SIGNATURES["EPYC-v4"]
EMPTY = hashlib.sha256(b"").digest()
FIRMWARE = FirmwareVolume(firmware_image())
HASHES = KernelHashes(EMPTY)
NORMAL, ZERO, VMSA = PageType.NORMAL, PageType.ZERO, PageType.VMSA
AT_4_GIB = 1 << 32


def config(firmware: FirmwareVolume = FIRMWARE, **given: Any) -> LaunchConfig:
    return LaunchConfig(firmware, **{"vcpus": 1, "signature": EPYC, **given})


def shape(regions: Any) -> list[tuple[PageType, int, int]]:
    return [(each.page_type, each.gpa, each.npages) for each in regions]


SECTIONS = [
    (ZERO, 0x80_0000, 9),
    (ZERO, 0x80_A000, 3),
    (PageType.SECRETS, 0x80_D000, 1),
    (PageType.CPUID, 0x80_E000, 1),
    (ZERO, 0x80_F000, 1),
    (ZERO, 0x81_0000, 1),
    (ZERO, 0x81_1000, 15),
]


def test_order_under_qemu() -> None:
    """Firmware below 4 GiB, sections in table order, then the vCPUs, all VMSA pages at one GPA."""
    regions = list(launch_plan(config(vcpus=3)))
    assert shape(regions) == [
        (NORMAL, AT_4_GIB - 0x1_0000, 16),
        *SECTIONS,
        (VMSA, VMSA_GPA, 1),
        (VMSA, VMSA_GPA, 2),
    ]
    assert regions[0].data == FIRMWARE.image
    assert [regions[-1].page_origin(number) for number in (0, 1)] == ["vCPU 1", "vCPU 2"]
    assert regions[1].page_origin(4) == "section 0 (SNP_SEC_MEM)"
    first, others = (
        reset_page(Vmm.QEMU, eip=eip, features=1, signature=EPYC) for eip in (RESET_EIP, AP_RESET_EIP)
    )
    assert [regions[-2].page(0), regions[-1].page(0), regions[-1].page(1)] == [first, others, others]
    assert repr(regions[1]) == "Region(section 0 (SNP_SEC_MEM), ZERO, 0x800000, 9)"


def test_order_under_ec2() -> None:
    """EC2: CPUID pages after all other sections."""
    kinds = shape(launch_plan(config(vmm=Vmm.EC2)))[1:-1]
    assert kinds == [each for each in SECTIONS if each[0] is not PageType.CPUID] + [
        (PageType.CPUID, 0x80_E000, 1)
    ]


def test_memory_under_gce() -> None:
    """GCE: memory of the firmware's early phase is UNMEASURED, not ZERO; other sections are as QEMU's."""
    kinds = shape(launch_plan(config(vmm=Vmm.GCE)))[1:-1]
    memory = {0x80_0000, 0x80_A000, 0x81_1000}
    assert kinds == [
        (PageType.UNMEASURED if gpa in memory else kind, gpa, npages) for kind, gpa, npages in SECTIONS
    ]


def test_secrets_and_cpuid_count_one_page() -> None:
    """SECRETS and CPUID count one page, whatever their size field says."""
    sections = [(0x80_0000, 0x3000, SectionType.SNP_SECRETS), (0x80_4000, 0x2000, SectionType.CPUID)]
    plan = launch_plan(config(FirmwareVolume(firmware_image(sections=sections))))
    assert shape(plan)[1:-1] == [(PageType.SECRETS, 0x80_0000, 1), (PageType.CPUID, 0x80_4000, 1)]


def test_kernel_hashes() -> None:
    """With a kernel, the section of type 10h is a NORMAL page with the table at the firmware's address."""
    regions = list(launch_plan(config(hashes=HASHES)))
    assert (regions[6].page_type, regions[6].gpa, regions[6].npages) == (NORMAL, 0x81_0000, 1)
    assert regions[6].page(0) == HASHES.page(0x81_0C00)
    assert shape(regions)[1:6] == SECTIONS[:5]


def test_kernel_without_a_section() -> None:
    """A kernel that nothing would measure is refused."""
    sections = [each for each in AMD_SEV if each[2] != SectionType.SNP_KERNEL_HASHES]
    firmware = FirmwareVolume(firmware_image(sections=sections))
    with pytest.raises(UsageError, match="no section of type SNP_KERNEL_HASHES"):
        launch_digest(config(firmware, hashes=HASHES))


@pytest.mark.parametrize("sections", [AMD_SEV, AMD_SEV[:5]])
def test_kernel_without_a_hash_table(sections: Any) -> None:
    """Firmware that was built without looks for no hashes."""
    firmware = FirmwareVolume(firmware_image(hash_table=(0, 0), sections=sections))
    with pytest.raises(UsageError, match="this firmware has no hash table area"):
        launch_digest(config(firmware, hashes=HASHES))
    assert len(launch_digest(config(firmware))) == 48


def test_small_hash_table() -> None:
    """QEMU: the area holds the whole table."""
    firmware = FirmwareVolume(firmware_image(hash_table=(0x81_0C00, 175)))
    with pytest.raises(LayoutError, match="hash table size: got 0xaf, wanted at least 0xb0"):
        launch_digest(config(firmware, hashes=HASHES))
    launch_digest(config(FirmwareVolume(firmware_image(hash_table=(0x81_0C00, 176))), hashes=HASHES))


@pytest.mark.parametrize("gpa", [0x80_FFFF, 0x81_1000])
def test_hash_table_elsewhere(gpa: int) -> None:
    """The table lies in the section that is measured for it."""
    firmware = FirmwareVolume(firmware_image(hash_table=(gpa, 0x400)))
    with pytest.raises(LayoutError, match=f"the one page with the hash table at {gpa:#x}"):
        launch_digest(config(firmware, hashes=HASHES))


def test_hash_section_of_two_pages() -> None:
    """Only one page of hashes is launched."""
    sections = [(0x81_0000, 0x2000, SectionType.SNP_KERNEL_HASHES)]
    firmware = FirmwareVolume(firmware_image(sections=sections))
    with pytest.raises(LayoutError, match=r"section 0 \(SNP_KERNEL_HASHES\): got 0x810000..0x812000"):
        launch_digest(config(firmware, hashes=HASHES))


def test_no_metadata() -> None:
    """An image without SEV metadata has no secrets page: measuring it silently would promise attestation."""
    firmware = FirmwareVolume(firmware_image(sections=None))
    with pytest.raises(LayoutError, match="no SEV metadata, wanted an image built for SEV-SNP"):
        launch_digest(config(firmware))
    plan = launch_plan(config(firmware, allow_no_metadata=True))
    assert [each.page_type for each in plan] == [NORMAL, VMSA]


def test_section_in_the_image() -> None:
    """AMD 56860: a page is launched once, so no section lies in the image."""
    inside = [(AT_4_GIB - 0x1_1000, 0x2000, SectionType.SNP_SEC_MEM)]
    firmware = FirmwareVolume(firmware_image(sections=inside))
    with pytest.raises(LayoutError, match="ends at 0xffff1000, wanted at most 0xffff0000"):
        launch_digest(config(firmware))
    beside = [(AT_4_GIB - 0x1_1000, 0x1000, SectionType.SNP_SEC_MEM)]
    launch_digest(config(FirmwareVolume(firmware_image(sections=beside))))


@pytest.mark.parametrize("size", [0, 1, 4095, 4097])
def test_image_of_part_pages(size: int) -> None:
    """SNP_LAUNCH_UPDATE takes whole pages."""
    with pytest.raises(LayoutError, match=f"firmware image: got {size} bytes, wanted whole pages"):
        image_digest(FirmwareVolume(bytes(size)))


class _Huge(bytes):
    size = AT_4_GIB

    def __len__(self) -> int:
        return self.size


def test_image_above_4_gib() -> None:
    """The image ends at 4 GiB, so it is no larger."""
    FirmwareVolume(_Huge()).check_pages()
    larger = type("Larger", (_Huge,), {"size": AT_4_GIB + 4096})
    with pytest.raises(LayoutError, match="wanted whole pages of 4096 bytes, at least one, at most 4 GiB"):
        FirmwareVolume(larger()).check_pages()


def test_digest_is_the_chain() -> None:
    """AMD 56860: one step a page over everything in the plan."""
    wanted = config(vcpus=3, hashes=HASHES)
    digest = bytes(48)
    for region in launch_plan(wanted):
        for number in range(region.npages):
            contents = page_contents(region.page_type, region.page(number))
            digest = extend(digest, contents, page_type=region.page_type, gpa=region.page_gpa(number))
    assert launch_digest(wanted) == digest


def test_a_region_without_data() -> None:
    """Zeros that do not count, and zeros that do."""
    region = Region("x", ZERO, 0x1000, 2)
    assert region.page(1) == bytes(4096)
    assert region.page_gpa(1) == 0x2000
    assert Region("x", NORMAL, 0, 1).extend(bytes(48)).hex().startswith("9d13634b6014bb21")


def test_number_of_vcpus() -> None:
    """255 vCPUs are 255 VMSA pages; none is the digest before the first; fewer is a mistake."""
    assert sum(each.npages for each in launch_plan(config(vcpus=255)) if each.page_type is VMSA) == 255
    assert all(each.page_type is not VMSA for each in launch_plan(config(vcpus=0)))
    with pytest.raises(UsageError, match="vCPUs: got -1, wanted at least 0"):
        config(vcpus=-1)


def test_a_reset_block_at_the_reset_vector() -> None:
    """Processors that all start alike are one region."""
    firmware = FirmwareVolume(firmware_image(reset_eip=RESET_EIP))
    assert shape(launch_plan(config(firmware, vcpus=4)))[-1] == (VMSA, VMSA_GPA, 4)


def test_no_reset_block() -> None:
    """Where application processors start has to be known."""
    with pytest.raises(LayoutError, match="no SEV-ES reset block"):
        launch_digest(config(FirmwareVolume(firmware_image(reset_eip=None))))


def test_registers_set_otherwise() -> None:
    """A host kernel before 6.10 leaves MXCSR and X87_FCW at zero; both VMSA pages follow."""
    plan = list(launch_plan(config(vcpus=2, vmsa_fields={"mxcsr": 0, "x87_fcw": 0})))
    for region, eip in zip(plan[-2:], (RESET_EIP, AP_RESET_EIP), strict=True):
        page = bytearray(reset_page(Vmm.QEMU, eip=eip, features=1, signature=EPYC))
        page[0x408:0x40C] = bytes(4)
        page[0x410:0x412] = bytes(2)
        assert region.page(0) == bytes(page)


# --- the image's digest in place of the image ---------------------------------------------------------------


def test_image_digest_as_seed() -> None:
    """snp:ovmf-hash: the digest after the image replaces the image; of it only its end is needed."""
    whole = FirmwareVolume(firmware_image(size=0x2_0000, text=b"code"))
    tail = FirmwareVolume(whole.image[-4096:])
    wanted = launch_digest(config(whole, vcpus=2))
    assert launch_digest(config(tail, vcpus=2), after_image=image_digest(whole)) == wanted
    assert launch_digest(config(tail, vcpus=2)) != wanted


def test_image_digest_of_another_size() -> None:
    """SHA-384 has 48 bytes."""
    with pytest.raises(UsageError, match="got 47 bytes, wanted 48"):
        launch_digest(config(), after_image=bytes(47))


# --- SVSM ---------------------------------------------------------------------------------------------------


def svsm_image(**given: Any) -> bytes:
    sections = [(0x80_1000, 0x1000, SectionType.SNP_SECRETS), (0x80_2000, 0x1000, SectionType.CPUID)]
    return firmware_image(**{"size": 0x8000, "sections": sections, "svsm_entry": 0x123, **given})


def svsm(**given: Any) -> Svsm:
    return Svsm(svsm_image(**given), firmware=FIRMWARE, vars_size=0x4000)


def test_svsm_launch() -> None:
    """Firmware, then the SVSM below its variables, the SVSM's own sections, and processors that enter it."""
    plan = list(launch_plan(config(svsm=svsm(), vcpus=3)))
    base = AT_4_GIB - 0x1_0000 - 0x4000 - 0x8000
    assert shape(plan) == [
        (NORMAL, AT_4_GIB - 0x1_0000, 16),
        (NORMAL, base, 8),
        (PageType.SECRETS, 0x80_1000, 1),
        (PageType.CPUID, 0x80_2000, 1),
        (VMSA, VMSA_GPA, 3),
    ]
    assert plan[1].data == svsm_image()
    assert plan[-1].page(0) == svsm_page(rip=base + 0x123, features=1, signature=EPYC)


def test_svsm_under_another_vmm() -> None:
    """SVSM mode is QEMU's."""
    with pytest.raises(UsageError, match="SVSM: got VMM ec2, wanted QEMU"):
        config(svsm=svsm(), vmm=Vmm.EC2)


def test_svsm_with_a_kernel() -> None:
    """An SVSM's launch does not measure a kernel, so one is refused."""
    with pytest.raises(UsageError, match="SVSM: got kernel hashes, wanted none"):
        config(svsm=svsm(), hashes=HASHES)


def test_svsm_with_an_image_digest() -> None:
    """sev-snp-measure: the seed is for mode snp only."""
    with pytest.raises(UsageError, match="got one with an SVSM"):
        launch_digest(config(svsm=svsm()), after_image=bytes(48))


@pytest.mark.parametrize("size", [0, 4095, 4097])
def test_svsm_of_part_pages(size: int) -> None:
    """SNP_LAUNCH_UPDATE takes whole pages."""
    with pytest.raises(LayoutError, match=f"SVSM image: got {size} bytes, wanted whole pages"):
        Svsm(bytes(size), firmware=FIRMWARE, vars_size=4096)


@pytest.mark.parametrize("size", [0, -4096, 4095])
def test_variables_of_part_pages(size: int) -> None:
    """The variable store is a flash device: whole pages."""
    with pytest.raises(UsageError, match=f"variable store: got {size}, wanted whole pages, at least one"):
        Svsm(svsm_image(), firmware=FIRMWARE, vars_size=size)


def test_svsm_without_room() -> None:
    """Everything lies above address 0."""
    room = AT_4_GIB - 0x1_0000 - 0x8000
    assert Svsm(svsm_image(), firmware=FIRMWARE, vars_size=room).gpa == 0
    with pytest.raises(UsageError, match="together below the firmware"):
        Svsm(svsm_image(), firmware=FIRMWARE, vars_size=room + 4096)


def test_svsm_entry_outside() -> None:
    """An SVSM is entered inside its image."""
    assert svsm(svsm_entry=0x7FFF).entry == svsm().gpa + 0x7FFF
    with pytest.raises(LayoutError, match="got entry 0x8000, wanted less than the image's 0x8000 bytes"):
        _ = svsm(svsm_entry=0x8000).entry


def test_svsm_without_metadata() -> None:
    """As a firmware: without SEV metadata it launches no secrets page."""
    bare = svsm(sections=None)
    with pytest.raises(LayoutError, match="SVSM image: no SEV metadata"):
        launch_digest(config(svsm=bare))
    kinds = [each.page_type for each in launch_plan(config(svsm=bare, allow_no_metadata=True))]
    assert kinds == [NORMAL, NORMAL, VMSA]


def test_svsm_section_in_the_image() -> None:
    """AMD 56860: a page is launched once, so no section lies in the SVSM or above it."""
    base = AT_4_GIB - 0x1_0000 - 0x4000 - 0x8000
    launch_digest(config(svsm=svsm(sections=[(base - 0x1000, 0x1000, 2)])))
    with pytest.raises(LayoutError, match=f"ends at {base + 0x1000:#x}, wanted at most {base:#x}"):
        launch_digest(config(svsm=svsm(sections=[(base, 0x1000, 2)])))


# --- SEV and SEV-ES -----------------------------------------------------------------------------------------


def test_sev() -> None:
    """SEV: SHA-256 of the image, and of the table with a kernel, which its firmware has to look for."""
    image = FIRMWARE.image
    assert sev_digest(FIRMWARE) == hashlib.sha256(image).digest()
    assert sev_digest(FIRMWARE, HASHES) == hashlib.sha256(bytes(image) + HASHES.table()).digest()
    with pytest.raises(UsageError, match="this firmware has no hash table area"):
        sev_digest(FirmwareVolume(firmware_image(hash_table=(0, 0))), HASHES)


def test_sev_es() -> None:
    """SEV-ES: every VMSA page follows; SEV_FEATURES is 0."""
    wanted = config(vcpus=3, features=0, hashes=HASHES)
    first, other = (
        reset_page(Vmm.QEMU, eip=eip, features=0, signature=EPYC) for eip in (RESET_EIP, AP_RESET_EIP)
    )
    loaded = bytes(FIRMWARE.image) + HASHES.table() + first + other + other
    assert sev_es_digest(wanted) == hashlib.sha256(loaded).digest()
    with pytest.raises(UsageError, match="SEV_FEATURES: got 0x1, wanted 0 for a SEV-ES guest"):
        sev_es_digest(config())


# --- known answers ------------------------------------------------------------------------------------------

AMD_SEV_ANSWERS = [
    (
        {"append": b""},
        "ddc5224521617a536ee7ce9dd6224d1b58a8d4fda1c741f3ac99fc4bfa04ba6e9fc98646d4a07a9079397fa3852819b5",
    ),
    (
        {"append": b"", "features": 0x21},
        "329c8ce0972ae52343b64d34a434a86f245dfd74f5ed7aae15d22efc78fb9683632b9b50e4e1d7fa41179ef98a7ef198",
    ),
    (
        {"append": b"console=ttyS0 loglevel=7"},
        "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa",
    ),
    (
        {"append": b"console=ttyS0 loglevel=7", "features": 0x21},
        "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977",
    ),
    ({}, "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d"),
    (
        {"append": b"", "vcpus": 4},
        "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5",
    ),
    (
        {"vmm": Vmm.EC2},
        "fb789cb6b947b7bb7cfd108d5f654ca1937e94e29c00a8ae5e529b6ed23b84216c4f6e898127ccd3b34975b4d4cf3988",
    ),
    (
        {"vmm": Vmm.GCE},
        "0d62cccec89752e245809461cf4fcd16b4f973e4ec040cefe07caf7b1cd6fcb4c331276faea5b62e630f899f392a7d69",
    ),
]


@pytest.mark.parametrize(("given", "wanted"), AMD_SEV_ANSWERS)
def test_known_answers(vectors: Path, given: dict[str, Any], wanted: str) -> None:
    """Digests of sev-snp-measure 8f2b337 over the end of an AmdSev build; kernel and RAM disk are empty."""
    firmware = FirmwareVolume((vectors / "measure" / "ovmf_AmdSev_suffix.bin").read_bytes())
    options = dict(given)
    if "append" in options:
        options["hashes"] = KernelHashes(EMPTY, append=options.pop("append"))
    assert launch_digest(config(firmware, **options)).hex() == wanted


def test_known_image_digest(vectors: Path) -> None:
    """The digest after the image alone."""
    firmware = FirmwareVolume((vectors / "measure" / "ovmf_AmdSev_suffix.bin").read_bytes())
    assert image_digest(firmware).hex() == (
        "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"
    )


DEBIAN_SHA256 = "7b456907dd0786d415999e801a1ac4637b8ed4d7cf5378cfc6edbe5e574dd773"


def test_known_answers_of_a_whole_image(debian_image: Path) -> None:
    """Debian bookworm, ovmf 2022.11-6+deb12u2: digests of sev-snp-measure 8f2b337."""
    firmware = FirmwareVolume(debian_image.read_bytes())
    if hashlib.sha256(firmware.image).hexdigest() != DEBIAN_SHA256:
        pytest.skip("another version of the package; remedy: Debian 12's ovmf 2022.11-6+deb12u2")
    assert launch_digest(config(firmware)).hex().startswith("11570979c77a0adb515761a702527c8b9e11554e7305")
    assert launch_digest(config(firmware, vcpus=4)).hex().startswith("32ac9d7a17d28f7cd4404a4516d2f005196")
    assert image_digest(firmware).hex().startswith("ba2c811512ef868474f239a21f7d7057d65a20de87a003c4f116e")
