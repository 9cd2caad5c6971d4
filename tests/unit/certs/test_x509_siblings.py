"""Certificates cut out by what a sibling's reading has shown. Source: docs/adr/0014.

The general reader is the judge: whatever is cut out, it has to read the same, and to refuse the same.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.certs.test_x509_reader import LEAF, TCB, certificate

from swsnp.abi.kds import OID_HWID
from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.certs.x509_reader import read_all, read_anew, read_der
from swsnp.certs.x509_siblings import _LARGEST_KEPT, _MOST_OF_ONE_SIZE, _shapes, learn, read_sibling
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tests.unit.certs.conftest import Authority

    from swsnp.certs.x509 import Certificate

SIZE_OF_OWN = 13 + 13 + 96 + 64 + 512
"""Bytes in which a VCEK of Milan may differ: two times of two-digit years, X and Y, HWID, signature."""
RSA = assemble.rsa_spki((1 << 4095) + 1, 65537)[0]
CA = replace(
    LEAF, serial=0x10000, spki=RSA, extensions=assemble.root_extensions(bytes(20), "https://x.invalid")
)


def told(read: Callable[[bytes], Certificate | None], data: bytes) -> Sequence[object]:
    """All that a reader says of it."""
    try:
        found = read(data)
    except LayoutError as error:
        return (str(error),)
    if found is None:
        return ()
    template = found.template
    return (
        *(value for name, value in found._asdict().items() if name != "template"),
        found.issuer,
        found.subject,
        found.issuer_cn,
        found.subject_cn,
        found.inner_algorithm,
        found.algorithm,
        found.extensions,
        found.extension(OID_HWID),
        template.extensions,
    )


def of_chip(number: int, product: Product = Product.MILAN) -> bytes:
    """The leaf of some chip: everything is its own that can be."""
    mark = bytes((number,))
    hwid = mark * product.hwid_size
    tbs = replace(
        LEAF,
        not_before=datetime(2024, 1, 2, 3, 4, number, tzinfo=UTC),
        not_after=datetime(2049, 1, 2, 3, 4, number, tzinfo=UTC),
        spki=assemble.ec_spki(mark * 48, b"y" * 48),
        extensions=assemble.leaf_extensions(product, product.value, tcb(product), hwid=hwid, csp_id=None),
    )
    return assemble.signed(assemble.tbs_certificate(tbs), tbs.algorithm, mark * 512)


def tcb(product: Product) -> TcbVersion:
    """A level of each."""
    return TcbVersion.encode(product, boot_loader=4, snp=0x18, microcode=0xDB)


def of_provider(number: int) -> bytes:
    """A VLEK: no HWID."""
    extensions = assemble.leaf_extensions(Product.MILAN, "Milan", TCB, hwid=None, csp_id="CN=x")
    tbs = replace(LEAF, spki=assemble.ec_spki(bytes((number,)) * 48, bytes(48)), extensions=extensions)
    return certificate(tbs)


@pytest.mark.parametrize(
    "make",
    [of_chip, lambda number: of_chip(number, Product.TURIN), of_provider],
    ids=["Milan", "Turin", "VLEK"],
)
def test_siblings_are_cut_out(make: Callable[[int], bytes]) -> None:
    """The second chip's leaf is not read anew, and what is cut out is what the general reader finds."""
    first, second = make(1), make(2)
    assert read_sibling(first) is None
    learnt = read_der(first)
    assert told(read_sibling, second) == told(read_anew, second)
    assert told(read_sibling, first) == told(read_anew, first)
    found = read_der(second)
    assert found.template is learnt.template
    assert (found == learnt, found == read_anew(second), found == second) == (False, True, False)
    assert hash(found) == hash(read_anew(second))
    assert f"{found}".startswith(f"Certificate({found.subject_cn!r}, serial=0x0, key=EcKey(")


def test_a_ca_is_known_whole(milan: Authority) -> None:
    """A CA's certificate comes again and again: the same bytes, the same object. A leaf is cut out."""
    for data, whole in ((milan.hierarchy.ark, True), (milan.hierarchy.ask, True), (milan.vcek, False)):
        assert (read_der(data) is read_der(bytes(bytearray(data)))) is whole


def test_genuine_certificates_are_cut_out(vectors: Path) -> None:
    """Every certificate of the key service, its own sibling: odd integers, trailer fields, wrapped HWIDs."""
    found = 0
    for path in sorted(vectors.rglob("*")):
        if path.suffix in (".der", ".pem") and "crl" not in path.name:
            for each in read_all(path.read_bytes()):
                assert told(read_sibling, each.der) == told(read_anew, each.der), path.name
                found += 1
    assert found >= 30


def test_only_what_is_a_chips_own_may_differ() -> None:
    """A byte spoiled, each in turn: outside of five places it is no sibling; inside, the readers agree."""
    data = of_chip(1)
    learn(read_anew(data))
    siblings = 0
    for at in range(len(data)):
        spoiled = data[:at] + bytes((data[at] ^ 1,)) + data[at + 1 :]
        told_by = told(read_sibling, spoiled)
        siblings += told_by != ()
        assert told_by in ((), told(read_anew, spoiled)), at
    assert siblings == SIZE_OF_OWN


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    which=st.sampled_from([of_chip(1), of_chip(1, Product.TURIN), of_provider(1), certificate(CA)]),
    changes=st.lists(st.tuples(st.integers(0, 1400), st.binary(max_size=6)), min_size=1, max_size=3),
)
def test_readers_agree(which: bytes, changes: list[tuple[int, bytes]]) -> None:
    """Bytes put in place of others anywhere: what was learnt before changes neither content nor refusal."""
    learn(read_anew(which))
    data = which
    for at, put in changes:
        data = data[:at] + put + data[at + len(put) :]
    assert told(read_der, data) == told(read_anew, data)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(first=st.binary(min_size=13, max_size=13), last=st.text("0123456789Z-", min_size=13, max_size=13))
def test_times_are_judged_alike(first: bytes, last: str) -> None:
    """RFC 5280, 4.1.2.5: a validity that is none is refused in the same words."""
    data = of_chip(1)
    learn(read_anew(data))
    at = data.index(b"\x17\x0d")
    data = data[: at + 2] + first + b"\x17\x0d" + last.encode() + data[at + 30 :]
    assert told(read_sibling, data) == told(read_anew, data) != ()


def test_other_shapes_of_one_size() -> None:
    """Leaves of several TCBs have one size: each is known by its own bytes, the latest that were learnt."""
    made = []
    for level in range(_MOST_OF_ONE_SIZE + 1):
        level_tcb = TcbVersion.encode(Product.MILAN, boot_loader=level)
        extensions = assemble.leaf_extensions(Product.MILAN, "Milan", level_tcb, hwid=bytes(64), csp_id=None)
        made.append(certificate(replace(LEAF, extensions=extensions)))
        read_der(made[-1])
    assert len(set(map(len, made))) == 1
    assert len(_shapes(len(made[0]))) == _MOST_OF_ONE_SIZE
    assert [read_sibling(each) is not None for each in made] == [False] + [True] * _MOST_OF_ONE_SIZE
    for each in made:
        assert told(read_der, each) == told(read_anew, each)


def test_large_certificates_are_not_kept() -> None:
    """What a host sends is bounded before it is remembered."""
    for size, kept in ((_LARGEST_KEPT, True), (_LARGEST_KEPT + 1, False)):
        empty = len(of_size(0))
        data = of_size(size - empty)
        assert len(data) == size
        read_der(data)
        assert (read_sibling(data) is not None) is kept


def of_size(more: int) -> bytes:
    """A leaf with so many bytes more in its last extension."""
    padding = assemble._extension("1.2.3", bytes(1000 + more))
    return certificate(replace(LEAF, extensions=(*LEAF.extensions, padding)))
