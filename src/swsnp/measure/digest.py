"""The launch digest: a chain of SHA-384 over PAGE_INFO, one step per 4 KiB.

Source: AMD 56860, SNP_LAUNCH_UPDATE and PAGE_INFO.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import sha384

from swsnp.abi.snp_page import GUEST_TSC_FIELDS, PAGE, PAGE_INFO_SIZE, PAGE_INFO_TAIL, PageType
from swsnp.errors import LayoutError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from mmap import mmap
    from typing import Final, TypeAlias

__all__ = ["PAGE", "Permissions", "extend", "extend_equal", "extend_range", "page_contents"]

Permissions: TypeAlias = tuple[int, int, int]
"""Permission bytes of VMPL1, VMPL2 and VMPL3."""
_NO_CONTENTS: Final = bytes(48)
_NO_IMAGE: Final = False
_NO_PERMISSIONS: Final = (0, 0, 0)
_NO_TSC: Final = bytes(GUEST_TSC_FIELDS.stop - GUEST_TSC_FIELDS.start)


def page_contents(page_type: PageType, page: bytes) -> bytes:
    """CONTENTS of one 4 KiB page: 48 bytes.

    A normal page counts with its SHA-384, a VMSA page with that of the page without its two TSC fields (the
    firmware fills them in), every other type with zeros.

    Raises:
        LayoutError: not 4096 bytes.
    """
    if len(page) != PAGE:
        raise LayoutError(
            f"measured page: got {len(page)} bytes, wanted {PAGE} (AMD 56860, SNP_LAUNCH_UPDATE)"
        )
    if page_type is PageType.NORMAL:
        return sha384(page).digest()
    if page_type is PageType.VMSA:
        return sha384(page[: GUEST_TSC_FIELDS.start] + _NO_TSC + page[GUEST_TSC_FIELDS.stop :]).digest()
    return _NO_CONTENTS


@lru_cache(maxsize=64)
def _between_contents_and_gpa(page_type: PageType, imi_page: bool, permissions: Permissions) -> bytes:
    return PAGE_INFO_TAIL.pack(PAGE_INFO_SIZE, page_type, imi_page, *permissions)


def extend(
    digest: bytes,
    contents: bytes,
    *,
    page_type: PageType,
    gpa: int,
    imi_page: bool = False,
    permissions: Permissions = (0, 0, 0),
) -> bytes:
    """One step of the chain: LD := SHA-384(PAGE_INFO).

    Args:
        digest: LD (or IMD) so far, 48 bytes.
        contents: as `page_contents`, 48 bytes.
        page_type: PAGE_TYPE.
        gpa: guest physical address of the page.
        imi_page: whether the page belongs to an initial migration image.
        permissions: of VMPL1..3.

    Raises:
        LayoutError: digest or contents not 48 bytes, or a number that does not fit its field.
    """
    if len(digest) != 48 or len(contents) != 48:
        raise LayoutError(
            f"PAGE_INFO: got a digest of {len(digest)} and contents of {len(contents)} bytes, wanted 48 each "
            "(AMD 56860)"
        )
    _check_gpa(gpa)
    middle = _between_contents_and_gpa(page_type, imi_page, permissions)
    return sha384(digest + contents + middle + gpa.to_bytes(8, "little")).digest()


def _check_gpa(gpa: int) -> None:
    if gpa >> 64:
        raise LayoutError(f"PAGE_INFO.gpa: got {gpa:#x}, wanted 8 bytes unsigned (AMD 56860)")


def extend_range(
    digest: bytes,
    data: bytes | mmap,
    *,
    page_type: PageType,
    gpa: int,
    imi_page: bool = False,
    permissions: Permissions = (0, 0, 0),
) -> bytes:
    """One step per 4 KiB of `data`, with rising addresses; arguments as `extend`.

    A page that equals the one before it is not hashed again: firmware images are mostly empty flash.

    Raises:
        LayoutError: `data` is not whole pages, or as `extend`.
    """
    if len(digest) != 48:
        raise LayoutError(f"PAGE_INFO: got a digest of {len(digest)} bytes, wanted 48 (AMD 56860)")
    if data:
        _check_gpa(gpa)
        _check_gpa(gpa + len(data) - 1)
    middle = _between_contents_and_gpa(page_type, imi_page, permissions)
    before, contents = b"", _NO_CONTENTS
    for at in range(0, len(data), PAGE):
        page = data[at : at + PAGE]
        if page != before:
            before, contents = page, page_contents(page_type, page)
        digest = sha384(digest + contents + middle + (gpa + at).to_bytes(8, "little")).digest()
    return digest


def extend_equal(
    digest: bytes, contents: bytes, count: int, *, page_type: PageType, gpa: int, step: int = PAGE
) -> bytes:
    """`count` steps with the same CONTENTS, at `gpa` and every `step` bytes above it; else as `extend`."""
    if not count:
        return digest
    _check_gpa(gpa + (count - 1) * step)
    digest = extend(digest, contents, page_type=page_type, gpa=gpa)
    rest = contents + _between_contents_and_gpa(page_type, _NO_IMAGE, _NO_PERMISSIONS)
    for at in range(1, count):
        digest = sha384(digest + rest + (gpa + at * step).to_bytes(8, "little")).digest()
    return digest
