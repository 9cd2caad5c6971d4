"""The extensions of VCEKs and VLEKs. Source: AMD 57230; genuine certificates where present."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import Product
from swsnp.certs.kds_extensions import issuing_product, leaf_kind, leaf_profile
from swsnp.certs.x509 import Certificate, Extension, SignatureAlgorithm, Template, split_hwid
from swsnp.certs.x509_reader import read_all
from swsnp.errors import LayoutError

if TYPE_CHECKING:
    from pathlib import Path

AMD = "1.3.6.1.4.1.3704.1"
ANY_TIME = datetime(2024, 1, 1, tzinfo=UTC)
NO_ALGORITHM = SignatureAlgorithm(der=b"", oid="", pss=None)
MILAN = {
    "1": "020100", "2": "16084d696c616e2d4230", "3.1": "020104", "3.2": "020100", "3.4": "020100",
    "3.5": "020100", "3.6": "020100", "3.7": "020100", "3.3": "020118", "3.8": "020200db", "4": "02" * 64,
}  # fmt: skip
TURIN = {
    "1": "020101", "2": "1605547572696e", "3.9": "020101", "3.1": "020102", "3.2": "020103", "3.3": "020104",
    "3.5": "020100", "3.6": "020100", "3.7": "020100", "3.8": "020151", "4": "0406060606060606",
}  # fmt: skip
VLEK = {**{k: v for k, v in MILAN.items() if k != "4"}, "2": "16054d696c616e", "5": "1604434e3d78"}


def leaf(values: dict[str, str], cn: str = "SEV-VCEK", issuer: str = "SEV-Milan") -> Certificate:
    extensions = tuple(
        Extension(oid=f"{AMD}.{oid}", critical=False, value=bytes.fromhex(value))
        for oid, value in values.items()
    )
    common, hwid = split_hwid(extensions)
    template = Template(
        issuer=b"",
        subject=b"",
        issuer_cn=issuer,
        subject_cn=cn,
        inner_algorithm=NO_ALGORITHM,
        algorithm=NO_ALGORITHM,
        extensions=common,
    )
    return Certificate(
        der=b"",
        template=template,
        tbs=b"",
        serial=0,
        not_before=ANY_TIME,
        not_after=ANY_TIME,
        spki=b"",
        key=None,
        signature=b"",
        hwid=hwid,
    )


def test_milan_vcek() -> None:
    """A microcode level of DBh has a leading zero byte: reading one byte would give 0."""
    got = leaf_profile(leaf(MILAN), Product.MILAN)
    assert got.tcb == {"boot_loader": 4, "tee": 0, "snp": 0x18, "microcode": 0xDB}
    assert (got.struct_version, got.product_name, got.csp_id) == (0, "Milan-B0", None)
    assert got.tcb_version.to_bytes(8, "little").hex() == "04000000000018db"
    assert got.hwid == bytes((2,)) * 64


def test_turin_vcek() -> None:
    """Turin: FMC first, an 8-byte HWID, here one that begins like an OCTET STRING. The OID decides."""
    got = leaf_profile(leaf(TURIN, issuer="SEV-Turin"), Product.TURIN)
    assert got.tcb == {"fmc": 1, "boot_loader": 2, "tee": 3, "snp": 4, "microcode": 0x51}
    assert got.tcb_version.to_bytes(8, "little").hex() == "0102030400000051"
    assert got.hwid == bytes.fromhex("0406060606060606")


def test_vlek() -> None:
    """A VLEK names a provider and no chip."""
    got = leaf_profile(leaf(VLEK, "SEV-VLEK", "SEV-VLEK-Milan"), Product.MILAN)
    assert (got.kind, got.csp_id, got.hwid) == ("vlek", "CN=x", None)


def test_wrapped_hwid() -> None:
    """Some certificates wrap the HWID in a second OCTET STRING."""
    got = leaf_profile(leaf({**MILAN, "4": "0440" + "07" * 64}), Product.MILAN)
    assert got.hwid == bytes((7,)) * 64


def test_unknown_extensions_are_listed() -> None:
    """AMD may add levels; the order of extensions is not fixed."""
    got = leaf_profile(leaf({"3.10": "020101", **MILAN}), Product.MILAN)
    assert got.unknown == (f"{AMD}.3.10",)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"1": None}, "structVersion: extension .* is missing"),
        ({"2": None}, "productName: extension .* is missing"),
        ({"2": "0c054d696c616e"}, "tag 0x0c, wanted tag 0x16"),
        ({"2": "1601ff"}, "no IA5String"),
        ({"3.8": None}, "microcode: extension .* is missing"),
        ({"3.3": None}, "snp: extension .* is missing"),
        ({"3.8": "02020100"}, "microcode: got 256, wanted 0..255"),
        ({"3.8": "0201db"}, "microcode: got -37, wanted 0..255"),
        ({"3.8": "02020073"}, "not the shortest form"),
        ({"3.8": "0201"}, "wanted 1 bytes"),
        ({"3.8": "02010100"}, "bytes follow"),
        ({"3.8": "040101"}, "wanted tag 0x02"),
        ({"3.5": "020101"}, "spl5: got 020101, wanted 0"),
        ({"3.9": "020101"}, "fmc: extension .* in a certificate of Milan"),
        ({"4": None}, "HWID: extension .* is missing"),
        ({"4": "02" * 63}, "HWID: got 63 bytes, wanted 64"),
        ({"4": "02" * 8}, "HWID: got 8 bytes, wanted 64"),
        ({"4": "0540" + "02" * 64}, "HWID: got 66 bytes"),
        ({"5": "1604434e3d78"}, "CSP id: .* in a VCEK"),
    ],
)
def test_broken_vceks_are_refused(changes: dict[str, str | None], text: str) -> None:
    """AMD 57230: each extension by its OID, none left out, none of another kind of leaf."""
    values = {oid: value for oid, value in {**MILAN, **changes}.items() if value is not None}
    with pytest.raises(LayoutError, match=text):
        leaf_profile(leaf(values), Product.MILAN)


def test_broken_vleks_are_refused() -> None:
    """A VLEK has a CSP id and no HWID."""
    with pytest.raises(LayoutError, match="HWID: .* in a VLEK"):
        leaf_profile(leaf({**VLEK, "4": "00" * 64}, "SEV-VLEK"), Product.MILAN)
    with pytest.raises(LayoutError, match="CSP id: extension .* is missing"):
        leaf_profile(leaf({k: v for k, v in VLEK.items() if k != "5"}, "SEV-VLEK"), Product.MILAN)
    with pytest.raises(LayoutError, match="common name 'SEV-Milan'"):
        leaf_profile(leaf(MILAN, "SEV-Milan"), Product.MILAN)


@pytest.mark.parametrize(
    ("cn", "issuer", "kind", "product"),
    [
        ("SEV-VCEK", "SEV-Turin", "vcek", Product.TURIN),
        ("SEV-VCEK", "SEV-VLEK-Milan", "vcek", None),
        ("SEV-VLEK", "SEV-VLEK-Genoa", "vlek", Product.GENOA),
        ("SEV-VLEK", "SEV-Genoa", "vlek", None),
        ("SEV-VCEK", "SEV-Venice", "vcek", None),
        ("ARK-Milan", "ARK-Milan", None, None),
    ],
)
def test_names_tell_kind_and_product(cn: str, issuer: str, kind: str | None, product: Product | None) -> None:
    """AMD 57230: the leaf's common name is its kind, the issuer's names the product line."""
    certificate = leaf({}, cn, issuer)
    assert (leaf_kind(certificate), issuing_product(certificate)) == (kind, product)


def test_genuine_leaves(vectors: Path) -> None:
    """Levels, productName and CSP id of every genuine leaf, against the vectors' own index."""
    names = {"bl": "boot_loader", "tee": "tee", "snp": "snp", "ucode": "microcode", "fmc": "fmc"}
    index = json.loads((vectors / "index.json").read_text())
    seen = 0
    for entry in index.values():
        for wanted in entry.get("leaf", ()) if isinstance(entry, dict) else ():
            certificate = read_all((vectors / wanted["file"]).read_bytes())[0]
            product = issuing_product(certificate)
            assert product is not None
            got = leaf_profile(certificate, product)
            assert got.tcb == {names[key]: level for key, level in wanted["spl"].items()}
            assert (got.product_name, got.csp_id) == (wanted["product_name"], wanted["csp_id"])
            assert got.struct_version == wanted["struct_version"]
            seen += 1
    assert seen >= 11


def test_genuine_vcek_without_a_report(vectors: Path) -> None:
    """Turin, November 2024: FMC, an 8-byte HWID, structVersion 1, no spl4."""
    certificate = read_all((vectors / "turin-vcek-only/vcek.der").read_bytes())[0]
    got = leaf_profile(certificate, Product.TURIN)
    assert got.tcb == {"fmc": 0, "boot_loader": 0, "tee": 0, "snp": 0, "microcode": 9}
    assert (got.struct_version, got.hwid) == (1, bytes.fromhex("1e550a8ee5cf9f4d"))
