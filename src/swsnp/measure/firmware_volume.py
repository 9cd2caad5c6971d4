"""A firmware image as it is mapped below 4 GiB, with the tables at its end.

Tables are read when they are asked for: an image of any bytes can be hashed.
"""

from __future__ import annotations

from functools import cached_property

from swsnp.abi import ovmf
from swsnp.abi.snp_page import PAGE
from swsnp.errors import LayoutError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap
    from typing import Final

    from swsnp.abi.ovmf import Section
    from swsnp.measure.kernel_hashes import KernelHashes

__all__ = ["FOUR_GIB", "FirmwareVolume"]

FOUR_GIB: Final = 1 << 32
_SOURCE: Final = "EDK II"


class FirmwareVolume:
    """An image, or the last part of one when only its tables are wanted."""

    def __init__(self, image: bytes | mmap) -> None:
        self.image = image

    @property
    def gpa(self) -> int:
        """Where it begins: it ends at 4 GiB."""
        return FOUR_GIB - len(self.image)

    def check_pages(self) -> None:
        """Refuse what cannot be launched page by page.

        Raises:
            LayoutError: not whole pages, none, or more than lie below 4 GiB.
        """
        size = len(self.image)
        if not size or size % PAGE or size > FOUR_GIB:
            raise LayoutError(
                f"firmware image: got {size} bytes, wanted whole pages of {PAGE} bytes, at least one, "
                "at most 4 GiB (AMD 56860, SNP_LAUNCH_UPDATE)"
            )

    @cached_property
    def table(self) -> dict[bytes, bytes]:
        """The GUID table; see `ovmf.guid_table`."""
        return ovmf.guid_table(self.image)

    @cached_property
    def sections(self) -> tuple[Section, ...] | None:
        """The SEV metadata; see `ovmf.sev_sections`."""
        return ovmf.sev_sections(self.image, self.table)

    @property
    def reset_eip(self) -> int:
        """Where application processors start; see `ovmf.reset_eip`."""
        return ovmf.reset_eip(self.table)

    def launched_sections(self, *, allow_no_metadata: bool = False) -> tuple[Section, ...]:
        """The sections, all of them, none of which lies in the image itself.

        Raises:
            LayoutError: no SEV metadata, unless that is allowed, or a section inside the image.
        """
        if self.sections is None:
            if allow_no_metadata:
                return ()
            raise LayoutError(
                "firmware image: no SEV metadata, wanted an image built for SEV-SNP; a guest started from "
                f"this one has no secrets page and cannot attest ({_SOURCE}, SEV metadata)"
            )
        for each in self.sections:
            if each.end > self.gpa:
                raise LayoutError(
                    f"SEV metadata {each.name}: ends at {each.end:#x}, wanted at most {self.gpa:#x}, where "
                    "the image begins: a page is launched once (AMD 56860, SNP_LAUNCH_UPDATE)"
                )
        return self.sections

    def hash_table_gpa(self) -> int:
        """Where the firmware looks for kernel hashes.

        Raises:
            UsageError: this firmware was built without.
            LayoutError: an area that is too small.
        """
        from swsnp.measure.kernel_hashes import TABLE_SIZE

        area = ovmf.number_pair(self.table, ovmf.HASH_TABLE)
        if area is None:
            raise UsageError(
                "kernel hashes: this firmware has no hash table area, wanted one built for them "
                f"({_SOURCE}, AmdSev)"
            )
        gpa, size = area
        if size < TABLE_SIZE:
            raise LayoutError(f"hash table size: got {size:#x}, wanted at least {TABLE_SIZE:#x} ({_SOURCE})")
        return gpa

    def hash_page(self, section: Section, hashes: KernelHashes) -> bytes:
        """What a section of type SNP_KERNEL_HASHES holds: 4096 bytes.

        Raises:
            UsageError: as `hash_table_gpa`.
            LayoutError: a section that is not the one page with the hash table area.
        """
        gpa = self.hash_table_gpa()
        if section.size != PAGE or gpa - gpa % PAGE != section.gpa:
            raise LayoutError(
                f"SEV metadata {section.name}: got {section.gpa:#x}..{section.end:#x}, wanted the one page "
                f"with the hash table at {gpa:#x} ({_SOURCE})"
            )
        return hashes.page(gpa)
