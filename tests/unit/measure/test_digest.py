"""The launch digest chain."""

from __future__ import annotations

import hashlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.abi.snp_command import PageType
from swsnp.abi.snp_launch import INITIAL_DIGEST, VMSA_GPA, PageInfo
from swsnp.abi.snp_page import GUEST_TSC_FIELDS, PAGE_INFO_SIZE, PAGE_INFO_TAIL
from swsnp.abi.vmsa import Vmsa
from swsnp.errors import LayoutError
from swsnp.measure.digest import extend, extend_equal, extend_range, page_contents

KNOWN = [
    (
        PageType.NORMAL,
        0,
        "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20",
    ),
    (
        PageType.ZERO,
        0x1000,
        "4bd4147976a1e7554c1c778a781affc1c672f1965a727ba16084989b7e356044a28bbe585a2f75dac9356fa5ab78f061",
    ),
    (
        PageType.UNMEASURED,
        0x2000,
        "cc5aed6a06f63b38d24155dfa38e924c44b41d2339bc8a7d3cb1995e67607e8889a81c2d42e75bb95627b40e344b8929",
    ),
    (
        PageType.SECRETS,
        0x80D000,
        "e82e99caf82a32c31ec5070eef9e2135866d8f7de60d756814f3bd8c989c1e826622e0a97dad026c6d9d81818780e6a2",
    ),
    (
        PageType.CPUID,
        0x80E000,
        "c9e46442d2b4ddb823fa6b4a907930de7e93901180c5a3126ba234193059a0a51a21ba82f05d2fe0f3136f22b1b1a8e4",
    ),
    (
        PageType.VMSA,
        VMSA_GPA,
        "f4577da9b848673216afc3909e5ea7aa80150dda441526874cd2b0282894709b46484c13a07221aefbedfff667199259",
    ),
]


@pytest.mark.parametrize(("page_type", "gpa", "digest"), KNOWN, ids=lambda each: getattr(each, "name", None))
def test_known_answers(page_type: PageType, gpa: int, digest: str) -> None:
    """Known answers, one page of zeros; all but UNMEASURED also given by sev-snp-measure."""
    assert extend_range(INITIAL_DIGEST, bytes(4096), page_type=page_type, gpa=gpa).hex() == digest


@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1 << 32), tsc=st.binary(min_size=16, max_size=16))
def test_vmsa_is_measured_without_its_tsc_fields(seed: int, tsc: bytes) -> None:
    """AMD 56860: 8 bytes at 2F0h and 8 bytes at 2F8h count as zero, all others count."""
    page = random.Random(seed).randbytes(4096)
    changed = page[:0x2F0] + tsc + page[0x300:]
    assert page_contents(PageType.VMSA, page) == page_contents(PageType.VMSA, changed)
    plain = hashlib.sha384(page[:0x2F0] + bytes(16) + page[0x300:]).digest()
    assert page_contents(PageType.VMSA, page) == plain


@pytest.mark.parametrize("at", [0, 0x2EF, 0x300, 4095])
def test_other_bytes_of_a_vmsa_count(at: int) -> None:
    """AMD 56860: only the two TSC fields are left out."""
    page = bytearray(4096)
    page[at] = 1
    assert page_contents(PageType.VMSA, bytes(page)) != page_contents(PageType.VMSA, bytes(4096))


@pytest.mark.parametrize("page_type", [PageType.ZERO, PageType.UNMEASURED, PageType.SECRETS, PageType.CPUID])
def test_contents_that_are_not_measured(page_type: PageType) -> None:
    """AMD 56860: CONTENTS of these types is zero whatever the page holds."""
    assert page_contents(page_type, b"\xff" * 4096) == bytes(48)


def test_a_large_page_is_512_steps_with_rising_addresses() -> None:
    """AMD 56860: one update per 4 KiB of a 2 MiB page."""
    data = b"".join(bytes([number & 0xFF]) * 4096 for number in range(512))
    digest = INITIAL_DIGEST
    for number in range(512):
        page = data[number * 4096 : (number + 1) * 4096]
        info = PageInfo(
            digest_cur=digest,
            contents=hashlib.sha384(page).digest(),
            length=0x70,
            page_type=1,
            gpa=0x20_0000 + number * 4096,
        )
        digest = hashlib.sha384(bytes(info)).digest()
    assert extend_range(INITIAL_DIGEST, data, page_type=PageType.NORMAL, gpa=0x20_0000) == digest


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    page_type=st.sampled_from(PageType),
    gpa=st.integers(0, (1 << 64) - 1),
    imi=st.booleans(),
    permissions=st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255)),
)
def test_a_step_is_the_hash_of_the_printed_structure(
    page_type: PageType, gpa: int, imi: bool, permissions: tuple[int, int, int]
) -> None:
    """AMD 56860: LD := SHA-384(PAGE_INFO), 70h bytes."""
    info = PageInfo(
        digest_cur=b"\x11" * 48,
        contents=b"\x22" * 48,
        length=0x70,
        page_type=page_type,
        imi_page=imi,
        vmpl1_perms=permissions[0],
        vmpl2_perms=permissions[1],
        vmpl3_perms=permissions[2],
        gpa=gpa,
    )
    got = extend(
        b"\x11" * 48, b"\x22" * 48, page_type=page_type, gpa=gpa, imi_page=imi, permissions=permissions
    )
    assert got == hashlib.sha384(bytes(info)).digest()


@pytest.mark.parametrize(("digest", "contents"), [(47, 48), (49, 48), (48, 0), (48, 64)])
def test_a_step_wants_48_bytes(digest: int, contents: int) -> None:
    """AMD 56860: DIGEST_CUR and CONTENTS are SHA-384 digests."""
    with pytest.raises(LayoutError, match="48"):
        extend(bytes(digest), bytes(contents), page_type=PageType.NORMAL, gpa=0)


@pytest.mark.parametrize("gpa", [-1, 1 << 64])
def test_an_address_has_64_bits(gpa: int) -> None:
    """AMD 56860: GPA is 8 bytes."""
    with pytest.raises(LayoutError, match="gpa"):
        extend(bytes(48), bytes(48), page_type=PageType.NORMAL, gpa=gpa)


@pytest.mark.parametrize("size", [1, 4095, 4097, 8191])
def test_only_whole_pages_are_measured(size: int) -> None:
    """AMD 56860: LAUNCH_UPDATE works on whole pages."""
    with pytest.raises(LayoutError, match="4096"):
        extend_range(bytes(48), bytes(size), page_type=PageType.NORMAL, gpa=0)


@pytest.mark.parametrize(("gpa", "text"), [(-4096, "got -0x1000"), ((1 << 64) - 4096, "got 0x1")])
def test_range_out_of_the_address_space(gpa: int, text: str) -> None:
    """AMD 56860, PAGE_INFO: GPA has 8 bytes, for the first page of a range and for the last."""
    with pytest.raises(LayoutError, match=f"PAGE_INFO.gpa: {text}"):
        extend_range(INITIAL_DIGEST, bytes(8192), page_type=PageType.NORMAL, gpa=gpa)


def test_range_up_to_the_end_of_the_address_space() -> None:
    """The last page of all is one; no page is none."""
    gpa = (1 << 64) - 4096
    page = bytes(4096)
    step = extend(INITIAL_DIGEST, page_contents(PageType.NORMAL, page), page_type=PageType.NORMAL, gpa=gpa)
    assert extend_range(INITIAL_DIGEST, page, page_type=PageType.NORMAL, gpa=gpa) == step
    assert extend_range(INITIAL_DIGEST, b"", page_type=PageType.NORMAL, gpa=gpa) == INITIAL_DIGEST


def test_range_on_another_digest() -> None:
    """AMD 56860, PAGE_INFO: DIGEST_CUR has 48 bytes."""
    with pytest.raises(LayoutError, match="got a digest of 47 bytes, wanted 48"):
        extend_range(bytes(47), bytes(4096), page_type=PageType.NORMAL, gpa=0)


def test_equal_pages() -> None:
    """Steps with the same contents, at rising addresses or at one."""
    contents = page_contents(PageType.VMSA, bytes(4096))
    for step in (0, 4096):
        digest = INITIAL_DIGEST
        for number in range(3):
            gpa = VMSA_GPA - 3 * 4096 + number * step
            digest = extend(digest, contents, page_type=PageType.VMSA, gpa=gpa)
        base = VMSA_GPA - 3 * 4096
        found = extend_equal(INITIAL_DIGEST, contents, 3, page_type=PageType.VMSA, gpa=base, step=step)
        assert found == digest


def test_equal_pages_out_of_the_address_space() -> None:
    """AMD 56860, PAGE_INFO: the last of them has an address too; none has none."""
    given: Any = {"page_type": PageType.ZERO, "gpa": (1 << 64) - 4096}
    with pytest.raises(LayoutError, match="PAGE_INFO.gpa: got 0x1"):
        extend_equal(INITIAL_DIGEST, bytes(48), 2, **given)
    one = extend(INITIAL_DIGEST, bytes(48), **given)
    assert extend_equal(INITIAL_DIGEST, bytes(48), 1, **given) == one
    assert extend_equal(INITIAL_DIGEST, bytes(48), 0, **given) == INITIAL_DIGEST


def test_packed_tail_is_the_record() -> None:
    """AMD 56860, PAGE_INFO: the packed form of LENGTH to VMPL3_PERMS is the record's."""
    info = PageInfo(length=0x70, page_type=2, imi_page=1, vmpl1_perms=3, vmpl2_perms=4, vmpl3_perms=5, gpa=0)
    assert PAGE_INFO_TAIL.pack(PAGE_INFO_SIZE, 2, 1, 3, 4, 5) == bytes(info)[0x60:0x68]
    assert PageInfo.SIZE == PAGE_INFO_SIZE
    offsets = {name: offset for name, offset, _ in Vmsa.layout()}
    assert offsets["guest_tsc_scale"] == GUEST_TSC_FIELDS.start
    assert offsets["reg_prot_nonce"] == GUEST_TSC_FIELDS.stop
