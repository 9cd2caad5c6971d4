"""The built-in guest's memory map, and what is measured into it at launch."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from swsnp.abi.ghcb import PAGE
from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import CpuidPage
from swsnp.errors import UsageError
from swsnp.guest.boot import GuestLayout
from swsnp.vmm.config import LaunchImage, LaunchPage

__all__ = ["built_in_image", "built_in_layout", "stand_in_layout"]

_FIRST_GPA: Final = 0x10_0000
_LARGE_PAGE: Final = 0x20_0000
_IMAGE_TEXT: Final = b"swsnp built-in guest, layout 1"


def built_in_layout(vcpus: int, *, first_gpa: int = _FIRST_GPA) -> tuple[GuestLayout, tuple[int, ...]]:
    """Where the built-in guest keeps its pages, and the VMSA pages of vCPU 1 and up.

    From `first_gpa` up: request, response, four certificate pages, secrets, CPUID, the measured image page,
    then one GHCB a vCPU, then one VMSA an AP; a VMSA never lies on a 2 MiB boundary, where hosts refuse it.
    """
    first_ghcb = first_gpa + 16 * PAGE
    layout = GuestLayout(
        request_page=first_gpa,
        response_page=first_gpa + PAGE,
        certs_buffer=first_gpa + 2 * PAGE,
        secrets_page=first_gpa + 6 * PAGE,
        cpuid_page=first_gpa + 7 * PAGE,
        ghcb_pages=tuple(first_ghcb + number * PAGE for number in range(vcpus)),
    )
    free = range(first_ghcb + vcpus * PAGE, first_ghcb + 3 * vcpus * PAGE, PAGE)
    vmsas = [gpa for gpa in free if gpa % _LARGE_PAGE]
    return layout, tuple(vmsas[: vcpus - 1])


def stand_in_layout(vcpus: int, image: LaunchImage) -> tuple[GuestLayout, tuple[int, ...]]:
    """The same for a guest that stands in for a firmware: its secrets and CPUID pages are the image's.

    Raises:
        UsageError: an image without a secrets page, with which no guest can attest.
    """
    secrets = _first(image, PageType.SECRETS)
    if secrets is None:
        raise UsageError("firmware image: no SECRETS section, wanted one: without it no guest can attest")
    size = 16 * PAGE + 3 * vcpus * PAGE
    first_gpa = _FIRST_GPA
    for each in sorted(image, key=lambda page: page.gpa):
        if each.gpa < first_gpa + size and first_gpa < each.end:
            first_gpa = -(-each.end // _FIRST_GPA) * _FIRST_GPA
    layout, vmsas = built_in_layout(vcpus, first_gpa=first_gpa)
    cpuid = _first(image, PageType.CPUID)
    return replace(layout, secrets_page=secrets, cpuid_page=cpuid or 0), vmsas


def _first(image: LaunchImage, kind: PageType) -> int | None:
    return next((page.gpa for page in image if page.type is kind), None)


def built_in_image(layout: GuestLayout) -> LaunchImage:
    """A page that names the guest, measured; the secrets page; a CPUID page without functions."""
    return (
        LaunchPage(PageType.NORMAL, _FIRST_GPA + 8 * PAGE, _IMAGE_TEXT.ljust(PAGE, b"\0")),
        LaunchPage(PageType.SECRETS, layout.secrets_page, bytes(PAGE)),
        LaunchPage(PageType.CPUID, layout.cpuid_page, bytes(CpuidPage())),
    )
