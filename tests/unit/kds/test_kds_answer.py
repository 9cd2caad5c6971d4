"""Answers held against requests: genuine ones pass, others are named. Source: AMD 57230."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product, TcbVersion
from swsnp.amd_ca import assemble
from swsnp.certs.kds_answer import LIMITS, judge, limit_of
from swsnp.certs.kds_extensions import leaf_profile
from swsnp.certs.kds_url import ChainRequest, CrlRequest, KdsRequest, LeafKind, VcekRequest, VlekRequest
from swsnp.certs.x509_reader import read, read_all, to_der, to_pem
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from pathlib import Path

    from swsnp.machine import Machine

GENUINE = [
    ("milan-v2-plain/vcek.der", Product.MILAN),
    ("milan-v2-authorkey/vcek.der", Product.MILAN),
    ("milan-v2-debug/vcek.der", Product.MILAN),
    ("milan-v2-idkey/vcek.der", Product.MILAN),
    ("milan-v3/vcek.pem", Product.MILAN),
    ("milan-v3/vcek_reissue_2025-12-29.pem", Product.MILAN),
    ("milan-v2-azure-hcl/vcek_and_chain.pem", Product.MILAN),
    ("milan-v2-hostdata/vcek_and_chain.pem", Product.MILAN),
    ("genoa-line-v5/vcek.der", Product.GENOA),
    ("turin-v5/vcek.pem", Product.TURIN),
    ("turin-vcek-only/vcek.der", Product.TURIN),
]


@pytest.mark.parametrize(("name", "product"), GENUINE)
def test_genuine_leaves(vectors: Path, name: str, product: Product) -> None:
    """Every genuine VCEK is the answer to its own request, and to no other chip's or TCB's."""
    leaf = to_der((vectors / name).read_bytes())[0]
    profile = leaf_profile(read(leaf), product)
    tcb, hwid = profile.tcb_version, profile.hwid or b""
    answer = judge(VcekRequest(product=product, hwid=hwid, tcb=tcb), leaf)
    assert (answer.der, answer.ends) == ((leaf,), read(leaf).not_after)
    with pytest.raises(InputError, match="answer, HWID"):
        judge(VcekRequest(product=product, hwid=bytes(len(hwid)), tcb=tcb), leaf)
    with pytest.raises(InputError, match="answer, TCB"):
        judge(VcekRequest(product=product, hwid=hwid, tcb=TcbVersion(tcb ^ 1)), leaf)


def test_a_genuine_vlek(vectors: Path) -> None:
    """The same for a provider's."""
    leaf = (vectors / "milan-v3-vlek" / "vlek.der").read_bytes()
    tcb = leaf_profile(read(leaf), Product.MILAN).tcb_version
    assert judge(VlekRequest(product=Product.MILAN, tcb=tcb), leaf).body == leaf
    with pytest.raises(InputError, match="answer, subject: got vlek, wanted vcek"):
        judge(VcekRequest(product=Product.MILAN, hwid=bytes(64), tcb=tcb), leaf)


@pytest.mark.parametrize("product", Product)
@pytest.mark.parametrize("kind", ["vcek", "vlek"])
def test_genuine_chains(vectors: Path, product: Product, kind: LeafKind) -> None:
    """ASK or ASVK, then ARK, as the service serves them; and not as the other kind's."""
    body = (vectors / "ca" / f"{product.value.lower()}_{kind}_cert_chain.pem").read_bytes()
    names = {"vcek": "ask", "vlek": "asvk"}
    folder, line = vectors / "ca", product.value.lower()
    expected = tuple((folder / f"{line}_{each}.der").read_bytes() for each in (names[kind], "ark"))
    answer = judge(ChainRequest(product=product, kind=kind), body)
    assert answer.der == expected
    assert answer.ends == min(each.not_after for each in read_all(body))
    other: LeafKind = "vlek" if kind == "vcek" else "vcek"
    with pytest.raises(InputError, match="answer, first subject"):
        judge(ChainRequest(product=product, kind=other), body)


@pytest.mark.parametrize(("name", "product"), [("milan", Product.MILAN), ("genoa", Product.GENOA)])
def test_genuine_lists(vectors: Path, name: str, product: Product) -> None:
    """The CRLs of 2022 are what was asked for; that they have ended is the client's to judge."""
    body = (vectors / "crl" / f"{name}_vcek_2022.crl.der").read_bytes()
    assert judge(CrlRequest(product=product), body).ends.year == 2023
    with pytest.raises(InputError, match="issuer of the CRL"):
        judge(CrlRequest(product=Product.TURIN), body)


def test_the_double_serves_the_genuine_form(vectors: Path, machines: dict[Product, Machine]) -> None:
    """Labels, line lengths, order and end of a chain are those of the genuine file."""
    genuine = (vectors / "ca" / "milan_vcek_cert_chain.pem").read_bytes()
    ours = machines[Product.MILAN].hierarchy.chain_pem()
    assert b"".join(to_pem(each) for each in to_der(genuine)) == genuine
    assert [len(line) for line in ours.splitlines()][:5] == [len(line) for line in genuine.splitlines()][:5]
    assert ours.endswith(genuine[-27:])


@pytest.fixture
def milan(machines: dict[Product, Machine]) -> Machine:
    return machines[Product.MILAN]


@pytest.fixture
def wanted(milan: Machine) -> VcekRequest:
    return VcekRequest(product=Product.MILAN, hwid=milan.hwid, tcb=milan.chip.reported_tcb)


def test_leaves_of_something_else(
    milan: Machine, machines: dict[Product, Machine], wanted: VcekRequest
) -> None:
    """Another kind, another product, a CA, two certificates, no certificate, or none that ends."""
    with pytest.raises(InputError, match="answer, subject: got SEV-Milan, wanted vcek"):
        judge(wanted, milan.hierarchy.ask)
    with pytest.raises(InputError, match="answer, issuer: got Turin, wanted Milan"):
        judge(wanted, machines[Product.TURIN].vcek_certificate())
    with pytest.raises(InputError, match="got PEM, wanted DER"):
        judge(wanted, to_pem(milan.vcek_certificate()))
    with pytest.raises(LayoutError):
        judge(wanted, milan.vcek_certificate()[:-1])
    with pytest.raises(InputError, match="got 0 bytes"):
        judge(wanted, b"")
    vlek = milan.vlek("CN=cc.example").certificate
    assert judge(VlekRequest(product=Product.MILAN, tcb=wanted.tcb), vlek).der == (vlek,)
    with pytest.raises(InputError, match="answer, subject: got vcek, wanted vlek"):
        judge(VlekRequest(product=Product.MILAN, tcb=wanted.tcb), milan.vcek_certificate())


def test_chains_of_something_else(milan: Machine, machines: dict[Product, Machine]) -> None:
    """Two certificates, the intermediate first, both of the product, one named by the other."""
    ask, ark = (to_pem(each) for each in (milan.hierarchy.ask, milan.hierarchy.ark))
    request = ChainRequest(product=Product.MILAN)
    for body, told in (
        (ark + ask, "first subject: got ARK-Milan, wanted SEV-Milan"),
        (ask + ask, "second subject: got SEV-Milan, wanted ARK-Milan"),
        (ask, "certificates: got 1, wanted 2"),
        (ask + ark + ark, "certificates: got 3, wanted 2"),
        (machines[Product.GENOA].hierarchy.chain_pem(), "first subject: got SEV-Genoa"),
        (milan.hierarchy.ask, "got DER, wanted PEM"),
        (ask + ark[:-30], "are whole"),
    ):
        with pytest.raises(InputError, match=told):
            judge(request, body)


def test_a_chain_of_two_hierarchies(milan: Machine) -> None:
    """Common names alone do not make a chain: the whole name of the issuer has to be there, twice."""
    ask, ark = milan.hierarchy.ask, milan.hierarchy.ark
    name = b"swsnp test CA, not AMD"
    request = ChainRequest(product=Product.MILAN)
    with pytest.raises(InputError, match="answer, issuer of SEV-Milan: got"):
        judge(request, to_pem(ask.replace(name, name.upper(), 1)) + to_pem(ark))
    with pytest.raises(InputError, match="answer, issuer of ARK-Milan: got"):
        judge(request, to_pem(ask) + to_pem(ark.replace(name, name.upper(), 1)))


def test_lists_of_something_else(milan: Machine) -> None:
    """PEM, a certificate, a list without an end."""
    request = CrlRequest(product=Product.MILAN)
    crl = milan.hierarchy.crl()
    with pytest.raises(InputError, match="got PEM, wanted DER"):
        judge(request, to_pem(crl, label="X509 CRL"))
    with pytest.raises(LayoutError):
        judge(request, milan.hierarchy.ark)


def test_a_list_without_an_end(milan: Machine) -> None:
    """Without nextUpdate nobody knows how long it may be kept."""
    ark = read(milan.hierarchy.ark)
    whole = assemble.crl_tbs(
        ark.subject, bytes(20), number=1, this_update=ark.not_before, next_update=ark.not_after, revoked=()
    )
    end = assemble._time(ark.not_after)
    inside = whole.index(end)
    cut = bytearray(whole[:inside] + whole[inside + len(end) :])
    cut[2:4] = (int.from_bytes(cut[2:4], "big") - len(end)).to_bytes(2, "big")
    with pytest.raises(LayoutError, match="CRL without nextUpdate"):
        judge(CrlRequest(product=Product.MILAN), assemble.signed(bytes(cut), assemble.PSS, bytes(512)))


@pytest.mark.parametrize(
    "request_",
    [
        VcekRequest(product=Product.MILAN, hwid=bytes(64), tcb=TcbVersion(0)),
        VlekRequest(product=Product.MILAN, tcb=TcbVersion(0)),
        ChainRequest(product=Product.MILAN),
        CrlRequest(product=Product.MILAN),
    ],
)
def test_limits(request_: KdsRequest) -> None:
    """One byte above the limit is refused before anything is read; at the limit it is read."""
    limit = limit_of(request_)
    assert limit in LIMITS.values()
    with pytest.raises(InputError, match=f"got more than {limit} bytes"):
        judge(request_, bytes(limit + 1))
    with pytest.raises((InputError, LayoutError), match="^(?!answer: got more)"):
        judge(request_, bytes(limit))
