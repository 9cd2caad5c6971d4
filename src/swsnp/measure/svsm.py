"""A Coconut-SVSM image: it lies below the firmware and its variables, and every processor starts in it.

Source: sev-snp-measure, mode snp:svsm; UNVERIFIED against an SVSM that ran.
"""

from __future__ import annotations

from swsnp.abi import ovmf
from swsnp.abi.snp_page import PAGE
from swsnp.errors import LayoutError, UsageError
from swsnp.measure.firmware_volume import FirmwareVolume

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap

    from swsnp.abi.ovmf import Section

__all__ = ["Svsm"]


class Svsm:
    """An SVSM under a firmware.

    Args:
        image: the SVSM's file.
        firmware: the guest's firmware.
        vars_size: bytes of the firmware's variable store, which lies between the two.

    Raises:
        LayoutError: an image that is not whole pages.
        UsageError: a variable store that is not whole pages, or no room below the firmware.
    """

    def __init__(self, image: bytes | mmap, *, firmware: FirmwareVolume, vars_size: int) -> None:
        self.volume = FirmwareVolume(image)
        if not image or len(image) % PAGE:
            raise LayoutError(
                f"SVSM image: got {len(image)} bytes, wanted whole pages of {PAGE} bytes, at least one "
                "(AMD 56860, SNP_LAUNCH_UPDATE)"
            )
        if vars_size <= 0 or vars_size % PAGE:
            raise UsageError(f"size of the variable store: got {vars_size}, wanted whole pages, at least one")
        self.gpa = firmware.gpa - vars_size - len(image)
        if self.gpa < 0:
            raise UsageError(
                f"SVSM image: {len(image):#x} bytes and {vars_size:#x} of variables, wanted at most "
                f"{firmware.gpa:#x} together below the firmware"
            )

    @property
    def entry(self) -> int:
        """Where every processor starts; LayoutError without an info block, or with one outside the image."""
        offset = ovmf.svsm_entry(self.volume.table)
        if offset >= len(self.volume.image):
            raise LayoutError(
                f"SVSM info block: got entry {offset:#x}, wanted less than the image's "
                f"{len(self.volume.image):#x} bytes (Coconut-SVSM)"
            )
        return self.gpa + offset

    def launched_sections(self, *, allow_no_metadata: bool = False) -> tuple[Section, ...]:
        """The SVSM's own sections, none of which lies in an image.

        Raises:
            LayoutError: no SEV metadata, unless that is allowed, or a section that reaches into the SVSM.
        """
        sections = self.volume.sections
        if sections is None and not allow_no_metadata:
            raise LayoutError("SVSM image: no SEV metadata, wanted an SVSM built for SEV-SNP (Coconut-SVSM)")
        for each in sections or ():
            if each.end > self.gpa:
                raise LayoutError(
                    f"SEV metadata {each.name}: ends at {each.end:#x}, wanted at most {self.gpa:#x}, where "
                    "the SVSM begins: a page is launched once (AMD 56860, SNP_LAUNCH_UPDATE)"
                )
        return sections or ()
