"""Roots of trust. Which ones count is always the caller's explicit choice, never the evidence's.

Pinned is SHA-256 of the DER SubjectPublicKeyInfo of each product's ARK, so a root issued again under the same
key stays good. Source: AMD's key service, /vcek/v1/{product}/cert_chain.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from swsnp.abi.kds import ark_name
from swsnp.abi.snp_report import Product
from swsnp.certs.x509_reader import read_all
from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from swsnp.certs.x509_reader import Certificate

__all__ = ["AMD_ARK_SPKI_SHA256", "AMD_CA_SHA256", "Roots", "spki_sha256"]

AMD_ARK_SPKI_SHA256: Final = {
    Product.MILAN: "9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9",
    Product.GENOA: "429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831",
    Product.TURIN: "4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08",
}
AMD_CA_SHA256: Final = {
    "ARK-Milan": "69d063b45344d26a2e94e1f4210de49ef555308287d4c174445c95639a540bcd",
    "SEV-Milan": "67d303bd3905fd38db8b20e0793699870e7fa612eaad5dec358293fd8c0bac1b",
    "SEV-VLEK-Milan": "c5e081f59b7efab1fe2f8b505e159704e72f29cab7ef7cf628a05a42439082f5",
    "ARK-Genoa": "4c6598d19c18719c5dfd4a7d335f674e5bfe1d8f800cea2cf270c10d103db2f1",
    "SEV-Genoa": "5464738c1546aed5f2cecf1dc98c5c960a92e8913238a61711bc90ec6e828521",
    "SEV-VLEK-Genoa": "197e610743a917d6b9bb982a5a9226ccc0a15b611be0619e626aca9151457372",
    "ARK-Turin": "1f084161a44bb6d93778a904877d4819cafa5d05ef4193b2ded9dd9c73dd3f6a",
    "SEV-Turin": "5b77ef5fe7a7a004fd9032668fba9d0fda22f88c4442069a479636a6ae3b3185",
    "SEV-VLEK-Turin": "104e10a8bd060a3c20a434261a57d0588fd65a88915b4f65b08bdecaf8df1a3c",
}
"""AMD's CA certificates, whole. Others under the pinned keys are as good; these save their verification."""


def spki_sha256(certificate: Certificate) -> str:
    """SHA-256 of the certificate's SubjectPublicKeyInfo, in hexadecimal."""
    return _sha256(certificate.spki)


@lru_cache(maxsize=64)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True, slots=True)
class Roots:
    """Keys that may stand at the top of a chain, per product line.

    Made by `amd` or `of`. `certificates` are those that the caller gave; they complete a chain whose evidence
    has no root.
    """

    pins: Mapping[Product, frozenset[str]]
    certificates: tuple[Certificate, ...] = ()
    known: frozenset[str] = frozenset()
    """SHA-256 of whole certificates whose signatures were verified when they were listed here."""

    @classmethod
    def amd(cls) -> Roots:
        """AMD's own roots: reports of real processors."""
        pins = {product: frozenset((pin,)) for product, pin in AMD_ARK_SPKI_SHA256.items()}
        return cls(pins, known=frozenset(AMD_CA_SHA256.values()))

    @classmethod
    def of(cls, *der: bytes) -> Roots:
        """Roots of the caller's choice: an emulated machine's, or a private hierarchy's.

        Args:
            der: certificates, DER or PEM, each with the common name ARK-{product}.

        Raises:
            UsageError: none is given.
            InputError: one is not named like a root, so no product is bound to it.
            LayoutError: one is malformed.
        """
        certificates = tuple(each for data in der for each in read_all(data))
        if not certificates:
            raise UsageError("roots: got none, wanted at least one certificate")
        pins: dict[Product, frozenset[str]] = {}
        for each in certificates:
            product = next((p for p in Product if each.subject_cn == ark_name(p)), None)
            if product is None:
                raise InputError(f"root: common name {each.subject_cn!r}, wanted ARK-{{Milan,Genoa,Turin}}")
            pins[product] = pins.get(product, frozenset()) | {spki_sha256(each)}
        return cls(pins, certificates)

    def pinned(self, certificate: Certificate, product: Product | None) -> bool:
        """Whether the certificate's key is a chosen root of that product line."""
        return product is not None and spki_sha256(certificate) in self.pins.get(product, ())

    def knows(self, certificate: Certificate) -> bool:
        """Whether this very certificate, byte for byte, is a known one."""
        return bool(self.known) and hashlib.sha256(certificate.der).hexdigest() in self.known

    def vouches(self, certificate: Certificate, root: Certificate, product: Product | None) -> bool:
        """Whether the signature need not be verified: the certificate is known, and the root is pinned."""
        return self.knows(certificate) and self.pinned(root, product)
