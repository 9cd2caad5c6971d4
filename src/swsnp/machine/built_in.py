"""The built-in guest's memory map, and what is measured into it at launch."""

from __future__ import annotations

from typing import Final

from swsnp.abi.ghcb import PAGE
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import CpuidPage
from swsnp.guest.boot import GuestLayout
from swsnp.vmm.config import LaunchImage, LaunchPage

__all__ = ["built_in_image", "built_in_layout"]

_FIRST_GPA: Final = 0x10_0000
_LARGE_PAGE: Final = 0x20_0000
_IMAGE_TEXT: Final = b"swsnp built-in guest, layout 1"


def built_in_layout(vcpus: int) -> tuple[GuestLayout, tuple[int, ...]]:
    """Where the built-in guest keeps its pages, and the VMSA pages of vCPU 1 and up.

    From 1 MiB up: request, response, four certificate pages, secrets, CPUID, the measured image page, then
    one GHCB a vCPU, then one VMSA an AP; a VMSA never lies on a 2 MiB boundary, where hosts refuse it.
    """
    first_ghcb = _FIRST_GPA + 16 * PAGE
    layout = GuestLayout(
        request_page=_FIRST_GPA,
        response_page=_FIRST_GPA + PAGE,
        certs_buffer=_FIRST_GPA + 2 * PAGE,
        secrets_page=_FIRST_GPA + 6 * PAGE,
        cpuid_page=_FIRST_GPA + 7 * PAGE,
        ghcb_pages=tuple(first_ghcb + number * PAGE for number in range(vcpus)),
    )
    free = range(first_ghcb + vcpus * PAGE, first_ghcb + 3 * vcpus * PAGE, PAGE)
    vmsas = [gpa for gpa in free if gpa % _LARGE_PAGE]
    return layout, tuple(vmsas[: vcpus - 1])


def built_in_image(layout: GuestLayout) -> LaunchImage:
    """A page that names the guest, measured; the secrets page; a CPUID page without functions."""
    return (
        LaunchPage(PageType.NORMAL, _FIRST_GPA + 8 * PAGE, _IMAGE_TEXT.ljust(PAGE, b"\0")),
        LaunchPage(PageType.SECRETS, layout.secrets_page, bytes(PAGE)),
        LaunchPage(PageType.CPUID, layout.cpuid_page, bytes(CpuidPage())),
    )
