"""URLs of the key service. Source: AMD 57230, KDS interface; genuine reports where present."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swsnp.abi.snp_report import REPORT_SIZE, AttestationReport, Product, SignerInfo, TcbVersion
from swsnp.certs.kds_extensions import issuing_product, leaf_profile
from swsnp.certs.kds_url import (
    KDS,
    ChainRequest,
    CrlRequest,
    KdsRequest,
    LeafKind,
    VcekRequest,
    VlekRequest,
    base_of,
    parse_target,
    parse_url,
    target_of,
    url_of,
    vcek_of_report,
)
from swsnp.certs.x509_reader import read_all
from swsnp.errors import InputError, LayoutError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

MILAN_TCB = TcbVersion.encode(Product.MILAN, boot_loader=4, tee=0, snp=24, microcode=219)
TURIN_TCB = TcbVersion.encode(Product.TURIN, fmc=1, boot_loader=2, tee=3, snp=4, microcode=81)
MILAN = VcekRequest(product=Product.MILAN, hwid=bytes(range(64)), tcb=MILAN_TCB)
HWID = bytes(range(64)).hex()
LEVELS = "blSPL=4&teeSPL=0&snpSPL=24&ucodeSPL=219"
EMPTY_REPORT = AttestationReport.parse(bytes(REPORT_SIZE))
REPORT = replace(
    EMPTY_REPORT, version=3, cpuid_fam_id=0x19, cpuid_mod_id=1, chip_id=MILAN.hwid, reported_tcb=MILAN_TCB
)


def tcbs(product: Product) -> st.SearchStrategy[TcbVersion]:
    level = st.integers(0, 255)
    names = TcbVersion.byte_order(product)
    return st.fixed_dictionaries(dict.fromkeys(names, level)).map(
        lambda levels: TcbVersion.encode(product, **levels)
    )


@st.composite
def requests(draw: st.DrawFn) -> KdsRequest:
    product = draw(st.sampled_from(Product))
    kinds: tuple[LeafKind, ...] = ("vcek", "vlek")
    kind = draw(st.sampled_from(kinds))
    hwid = draw(st.binary(min_size=product.hwid_size, max_size=product.hwid_size))
    tcb = draw(tcbs(product))
    each: tuple[KdsRequest, ...] = (
        VcekRequest(product=product, hwid=hwid, tcb=tcb),
        VlekRequest(product=product, tcb=tcb),
        ChainRequest(product=product, kind=kind),
        CrlRequest(product=product, kind=kind),
    )
    return draw(st.sampled_from(each))


@pytest.mark.parametrize(
    ("request_", "url"),
    [
        (MILAN, f"{KDS}/vcek/v1/Milan/{HWID}?{LEVELS}"),
        (
            VcekRequest(product=Product.TURIN, hwid=bytes(range(8)), tcb=TURIN_TCB),
            f"{KDS}/vcek/v1/Turin/0001020304050607?fmcSPL=1&blSPL=2&teeSPL=3&snpSPL=4&ucodeSPL=81",
        ),
        (VlekRequest(product=Product.GENOA, tcb=MILAN_TCB), f"{KDS}/vlek/v1/Genoa/cert?{LEVELS}"),
        (ChainRequest(product=Product.MILAN), f"{KDS}/vcek/v1/Milan/cert_chain"),
        (ChainRequest(product=Product.TURIN, kind="vlek"), f"{KDS}/vlek/v1/Turin/cert_chain"),
        (CrlRequest(product=Product.GENOA), f"{KDS}/vcek/v1/Genoa/crl"),
        (CrlRequest(product=Product.MILAN, kind="vlek"), f"{KDS}/vlek/v1/Milan/crl"),
    ],
)
def test_urls_as_printed(request_: KdsRequest, url: str) -> None:
    """Path, lower-case hexadecimal, plain decimal, and the parameters that the product has."""
    assert url_of(request_) == url
    assert parse_url(url) == (KDS, request_)


@given(requests(), st.sampled_from((KDS, "http://127.0.0.1:8080", "http://[::1]:99", "https://a-b.example")))
def test_there_and_back(request_: KdsRequest, base: str) -> None:
    """What is built is read back as the same, at any service."""
    assert parse_url(url_of(request_, base)) == (base, request_)


@given(st.text(max_size=300) | st.from_regex(r"/v[cl]ek/v1/(Milan|Genoa|Turin)/[0-9a-f?=&blSPL]*"))
def test_any_text_is_read_or_refused(text: str) -> None:
    """Arbitrary text is a request that is written the same way in its plain form, or a LayoutError."""
    try:
        found = parse_target(text)
    except LayoutError:
        return
    assert parse_target(target_of(found)) == found


def test_levels_with_leading_zeros_and_upper_case_are_read() -> None:
    """The service takes both ways in which clients print levels, and hexadecimal of either case."""
    text = f"/vcek/v1/Milan/{HWID.upper()}?blSPL=04&teeSPL=00&snpSPL=24&ucodeSPL=219"
    assert parse_target(text) == MILAN


def test_order_of_levels_does_not_matter() -> None:
    """Parameters are told by their names."""
    text = f"/vcek/v1/Milan/{HWID}?ucodeSPL=219&snpSPL=24&teeSPL=0&blSPL=4"
    assert parse_target(text) == MILAN


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("", "printable characters"),
        (f"/vcek/v1/Milan/{HWID}?{LEVELS} ", "printable characters"),
        ("/" + "a" * 2048, "up to 2048"),
        ("/vcek/v1/Milan", "wanted /vcek/v1/PRODUCT"),
        ("/vcek/v1/Milan/crl/", "wanted /vcek/v1/PRODUCT"),
        ("x/vcek/v1/Milan/crl", "wanted /vcek/v1/PRODUCT"),
        ("x/v1/Milan/crl/", "wanted /vcek/v1/PRODUCT"),
        ("/ask/v1/Milan/crl", "wanted /vcek/v1/PRODUCT"),
        ("/vcek/v2/Milan/crl", "wanted /vcek/v1/PRODUCT"),
        ("/vcek/v1/milan/crl", "KDS product: got 'milan', wanted Milan, Genoa, Turin"),
        ("/vcek/v1/Milan/crl?", "KDS crl: got parameters ''"),
        ("/vlek/v1/Milan/cert_chain?x=1", "KDS cert_chain: got parameters 'x=1'"),
        (f"/vlek/v1/Milan/{HWID}?{LEVELS}", "wanted cert, cert_chain or crl"),
        (f"/vcek/v1/Milan/cert?{LEVELS}", "wanted 128 hexadecimal digits for Milan"),
        (f"/vcek/v1/Milan/{HWID[:-2]}?{LEVELS}", "wanted 128 hexadecimal digits"),
        (f"/vcek/v1/Milan/{HWID[:-1]}g?{LEVELS}", "wanted 128 hexadecimal digits"),
        (f"/vcek/v1/Turin/{HWID}?fmcSPL=1&{LEVELS}", "wanted 16 hexadecimal digits for Turin"),
        (f"/vcek/v1/Milan/{HWID}", "KDS parameter: got ''"),
        (f"/vcek/v1/Milan/{HWID}?{LEVELS}&blSPL=4", "KDS parameter: got 'blSPL=4', wanted each of"),
        (f"/vcek/v1/Milan/{HWID}?{LEVELS}&fmcSPL=4", "KDS parameter: got 'fmcSPL=4'"),
        (f"/vcek/v1/Milan/{HWID}?blSPL=4&teeSPL=0&snpSPL=24", "ucodeSPL missing"),
        (f"/vcek/v1/Milan/{HWID}?blSPL=256&teeSPL=0&snpSPL=24&ucodeSPL=1", "KDS blSPL: got '256'"),
        (f"/vcek/v1/Milan/{HWID}?blSPL=0004&teeSPL=0&snpSPL=24&ucodeSPL=1", "KDS blSPL: got '0004'"),
        (f"/vcek/v1/Milan/{HWID}?blSPL=+4&teeSPL=0&snpSPL=24&ucodeSPL=1", "KDS blSPL"),
        (f"/vcek/v1/Milan/{HWID}?blSPL=&teeSPL=0&snpSPL=24&ucodeSPL=1", "KDS blSPL: got ''"),
    ],
)
def test_what_the_service_does_not_have(target: str, told: str) -> None:
    """Rules 1 to 4 of `parse_target`; the text says which part and what was wanted."""
    with pytest.raises(LayoutError, match="KDS") as caught:
        parse_target(target)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "https://", "https://x", "kdsintf.amd.com/vcek/v1/Milan/crl", f"{KDS}/ä"]
)
def test_no_url(url: str) -> None:
    """Without scheme, host and path there is nothing to ask for."""
    with pytest.raises(LayoutError, match="KDS URL"):
        parse_url(url)


@pytest.mark.parametrize(
    "base",
    [
        "ftp://a", "https://", "https://u@a", "https://a/b", "https://a?", "https://a#", "https://a:0",
        "https://a:99999", "https://a b", "https://[::1", "a", "https://a:x", "https://-a", "https://a/b/..",
    ],
)  # fmt: skip
def test_no_address(base: str) -> None:
    """A service's address is scheme, host and port, and nothing that could change what is asked for."""
    with pytest.raises(UsageError, match="KDS address"):
        base_of(base)


def test_limits_of_length() -> None:
    """2,048 characters are looked at, 2,049 are not."""
    for parse, start, what in ((parse_target, "/", "path"), (parse_url, f"{KDS}/", "URL")):
        with pytest.raises(LayoutError, match=rf"KDS {what}: .* wanted up to 2048"):
            parse(start + (2049 - len(start)) * "a")
        with pytest.raises(LayoutError, match="KDS path: .* wanted /vcek"):
            parse(start + (2048 - len(start)) * "a")


def test_no_host() -> None:
    """A path, and nobody to ask for it."""
    with pytest.raises(UsageError, match="KDS address: got 'https://'"):
        parse_url("https:///vcek/v1/Milan/crl")


def test_one_form_of_an_address() -> None:
    """The cache goes by the address, so it has one form."""
    assert base_of("HTTPS://KdsIntf.amd.com/") == KDS


@pytest.mark.parametrize(
    ("product", "hwid", "tcb"),
    [
        (Product.MILAN, bytes(8), MILAN_TCB),
        (Product.TURIN, bytes(64), TURIN_TCB),
        (Product.MILAN, bytes(64), TcbVersion(1 << 16)),
        (Product.TURIN, bytes(8), TcbVersion(1 << 32)),
    ],
)
def test_what_no_url_can_say(product: Product, hwid: bytes, tcb: TcbVersion) -> None:
    """A chip id of the wrong size, or a TCB in bytes that no parameter carries, is refused at once."""
    with pytest.raises(LayoutError, match="KDS (hwid|TCB)"):
        VcekRequest(product=product, hwid=hwid, tcb=tcb)


def test_what_no_vlek_url_can_say() -> None:
    """The same for a provider's certificate."""
    with pytest.raises(LayoutError, match="KDS TCB"):
        VlekRequest(product=Product.MILAN, tcb=TcbVersion(1 << 16))


def test_a_report_names_its_certificate() -> None:
    """CHIP_ID at REPORTED_TCB; family and model of version 3 name the product line."""
    assert vcek_of_report(REPORT) == MILAN
    assert vcek_of_report(REPORT, Product.MILAN) == MILAN


@pytest.mark.parametrize(
    ("changes", "product", "refusal", "told"),
    [
        ({"signer_info": SignerInfo.of(signing_key=1)}, None, InputError, "SIGNING_KEY is 1"),
        ({"signer_info": SignerInfo.of(signing_key=7)}, None, InputError, "SIGNING_KEY is 7"),
        ({"chip_id": bytes(64)}, None, InputError, "CHIP_ID is masked"),
        ({"version": 2}, None, UsageError, "version 2 names no known product line"),
        ({"cpuid_fam_id": 0x1B}, None, UsageError, "version 3 names no known product line"),
        ({}, Product.GENOA, UsageError, "got Genoa, the report is from a Milan"),
        ({"reported_tcb": TcbVersion(1 << 16)}, None, LayoutError, "KDS TCB"),
    ],
)
def test_reports_without_a_certificate_to_ask_for(
    changes: dict[str, Any], product: Product | None, refusal: type[Exception], told: str
) -> None:
    """A VLEK, an unsigned report, a masked chip, an unknown or contradicted product: each says what to do."""
    with pytest.raises(refusal, match=told):
        vcek_of_report(replace(REPORT, **changes), product)


def test_version_2_is_told_the_product() -> None:
    """Version 2 has no family and model; what stands there is not looked at."""
    old = replace(REPORT, version=2, cpuid_fam_id=0x1A, cpuid_mod_id=2)
    assert vcek_of_report(old, Product.GENOA).product is Product.GENOA


@pytest.mark.parametrize(
    ("folder", "certificate", "product"),
    [
        ("milan-v2-plain", "vcek.der", Product.MILAN),
        ("milan-v3", "vcek.pem", None),
        ("milan-v3", "vcek_reissue_2025-12-29.pem", None),
        ("genoa-line-v5", "vcek.der", None),
        ("turin-v5", "vcek.pem", None),
        ("milan-v2-azure-hcl", "vcek_and_chain.pem", Product.MILAN),
    ],
)
def test_genuine_reports_ask_for_their_certificate(
    vectors: Path, folder: str, certificate: str, product: Product | None
) -> None:
    """The URL of a genuine report carries what AMD wrote into the certificate that belongs to it."""
    report = AttestationReport.parse((vectors / folder / "report.bin").read_bytes())
    leaf = read_all((vectors / folder / certificate).read_bytes())[0]
    named = issuing_product(leaf)
    assert named is not None
    profile = leaf_profile(leaf, named)
    wanted = VcekRequest(product=named, hwid=profile.hwid or b"", tcb=profile.tcb_version)
    assert vcek_of_report(report, product) == wanted
    assert parse_url(url_of(wanted)) == (KDS, wanted)
