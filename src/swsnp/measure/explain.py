"""A launch page by page, and where two launches part.

Source: AMD 56860, SNP_LAUNCH_UPDATE, for the chain; the rest compares `launch_plan` with itself.
"""

from __future__ import annotations

from itertools import chain, groupby, zip_longest
from typing import TYPE_CHECKING, NamedTuple

from swsnp.abi.snp_launch import INITIAL_DIGEST
from swsnp.abi.snp_page import PAGE, PageType
from swsnp.measure.digest import extend, page_contents
from swsnp.measure.kernel_hashes import TABLE_SIZE
from swsnp.measure.launch_plan import launch_plan
from swsnp.measure.vmsa_pages import FIELDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from swsnp.measure.launch_plan import LaunchConfig

__all__ = ["Difference", "Page", "Run", "differences", "explain", "first_difference", "pages"]

_HASHES_AT = {"cmdline": 18 + 18, "initrd": 18 + 50 + 18, "kernel": 18 + 100 + 18}
"""Offset of each SHA-256 in the table of kernel hashes."""


class Page(NamedTuple):
    """One step of the chain: its place in the launch, counted from 0, and its own bytes."""

    number: int
    origin: str
    page_type: PageType
    gpa: int
    contents: bytes
    data: bytes


class Run(NamedTuple):
    """Pages one after the other that are measured alike; `digest` is the launch digest after them."""

    origin: str
    page_type: PageType
    gpa: int
    npages: int
    contents: bytes
    digest: bytes


class Difference(NamedTuple):
    """The first page that two launches do not share; None: that launch ends before. `reasons`, for people."""

    number: int
    first: Page | None
    second: Page | None
    reasons: tuple[str, ...]


def pages(config: LaunchConfig) -> Iterator[Page]:
    """Every page in its order; errors as `launch_plan`."""
    count = 0
    for region in launch_plan(config):
        for number in range(region.npages):
            data = region.page(number)
            contents = page_contents(region.page_type, data)
            origin = region.page_origin(number)
            yield Page(count, origin, region.page_type, region.page_gpa(number), contents, data)
            count += 1


def explain(config: LaunchConfig) -> Iterator[Run]:
    """Every run of equal pages; errors as `launch_plan`."""
    digest = INITIAL_DIGEST
    for _, alike in groupby(pages(config), key=_measured_alike):
        first, npages = next(alike), 0
        for page in chain([first], alike):
            digest = extend(digest, page.contents, page_type=page.page_type, gpa=page.gpa)
            npages += 1
        yield Run(first.origin, first.page_type, first.gpa, npages, first.contents, digest)


def _measured_alike(page: Page) -> tuple[str, PageType, bytes]:
    """What pages of one run share; pages of one origin lie side by side."""
    return page.origin, page.page_type, page.contents


def first_difference(first: LaunchConfig, second: LaunchConfig) -> Difference | None:
    """The first page in which two launches differ, and why; None: they are measured alike."""
    for a, b in zip_longest(pages(first), pages(second)):
        if a is None or b is None:
            page = a or b
            which = "second" if a is None else "first"
            return Difference(page.number, a, b, (f"only the {which} goes on, with {page.origin}",))
        if (a.page_type, a.gpa, a.contents) != (b.page_type, b.gpa, b.contents):
            return Difference(a.number, a, b, tuple(differences(a, b)))
    return None


def differences(first: Page, second: Page) -> Iterator[str]:
    """Why two pages are measured differently, one reason a line."""
    if first.origin != second.origin:
        yield f"origin: {first.origin}, {second.origin}"
    if first.page_type is not second.page_type:
        yield f"type: {first.page_type.name}, {second.page_type.name}"
    if first.gpa != second.gpa:
        yield f"gpa: {first.gpa:#x}, {second.gpa:#x}"
    if first.page_type is second.page_type and first.contents != second.contents:
        yield from _contents(first, second)


def _contents(first: Page, second: Page) -> Iterator[str]:
    if first.page_type is PageType.VMSA:
        for name, (offset, size) in FIELDS.items():
            a, b = (int.from_bytes(each.data[offset : offset + size], "little") for each in (first, second))
            if a != b:
                yield f"VMSA field {name}: {a:#x}, {b:#x}"
    elif "SNP_KERNEL_HASHES" in first.origin and first.origin == second.origin:
        yield from _hashes(first.data, second.data)
    else:
        at = next(at for at in range(PAGE) if first.data[at] != second.data[at])
        texts = (each.data[at : at + 8].hex() for each in (first, second))
        yield f"bytes: from {at:#x} of the page on, {', '.join(texts)}"


def _hashes(first: bytes, second: bytes) -> Iterator[str]:
    starts = [next(at for at in range(PAGE) if page[at]) for page in (first, second)]
    if starts[0] != starts[1]:
        yield f"hash table base: page offset {starts[0]:#x}, {starts[1]:#x}"
    tables = [page[at : at + TABLE_SIZE] for page, at in zip((first, second), starts, strict=True)]
    for name, at in _HASHES_AT.items():
        a, b = (table[at : at + 32] for table in tables)
        if a != b:
            yield f"SHA-256 of {name}: {a.hex()}, {b.hex()}"
