"""Which part of a chain a certificate is, by its names, and how a Name reads. Source: AMD 57230."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.kds import ark_name, ask_name, asvk_name
from swsnp.abi.snp_report import Product
from swsnp.certs import der
from swsnp.certs.der import Der
from swsnp.certs.kds_extensions import issuing_product, leaf_kind

if TYPE_CHECKING:
    from swsnp.certs.x509_reader import Certificate

__all__ = ["Role", "name_text", "printable", "role_of"]

_CA_NAMES: Final = {
    "ARK": ark_name,
    "ASK": ask_name,
    "ASVK": asvk_name,
}
_SHORT: Final = {
    "2.5.4.3": "CN",
    "2.5.4.6": "C",
    "2.5.4.7": "L",
    "2.5.4.8": "ST",
    "2.5.4.10": "O",
    "2.5.4.11": "OU",
}


class Role(StrEnum):
    """The five certificates of the key service."""

    VCEK = "VCEK"
    VLEK = "VLEK"
    ASK = "ASK"
    ASVK = "ASVK"
    ARK = "ARK"

    @property
    def is_leaf(self) -> bool:
        """Whether its key signs reports."""
        return self in (Role.VCEK, Role.VLEK)

    @property
    def issuer(self) -> Role:
        """Who signs it; the ARK signs itself."""
        return _ISSUERS[self]


_ISSUERS: Final = {
    Role.VCEK: Role.ASK,
    Role.VLEK: Role.ASVK,
    Role.ASK: Role.ARK,
    Role.ASVK: Role.ARK,
    Role.ARK: Role.ARK,
}
_BY_NAME: Final = {
    name(product): (Role(role), product) for role, name in _CA_NAMES.items() for product in Product
}


def role_of(certificate: Certificate) -> tuple[Role, Product | None] | None:
    """Role and product line by common names; None for a certificate that is none of the five.

    A leaf does not name its product line, its issuer does: the product is None when that is no ASK or ASVK.
    """
    kind = leaf_kind(certificate)
    if kind is not None:
        return Role(kind.upper()), issuing_product(certificate)
    return _BY_NAME.get(certificate.subject_cn)


def name_text(name: bytes) -> str:
    """A Name of a certificate or CRL that was read, as `OU=Engineering, C=US, …`, in its own order.

    Characters that a terminal would act upon come out escaped.
    """
    parts = []
    relative = Der(der.unwrap(name, der.SEQUENCE, "name"), "name")
    while relative.peek() is not None:
        pairs = relative.inside(der.SET, "rdn")
        while (pair := pairs.peek()) is not None:
            attribute = pairs.inside(pair, "attribute")
            kind = der.oid(attribute.value(der.OID, "type"), "name")
            text = attribute.value(attribute.peek() or 0, "value").decode("utf-8", "backslashreplace")
            parts.append(f"{_SHORT.get(kind, kind)}={printable(text)}")
    return ", ".join(parts)


def printable(text: str) -> str:
    """The same for a terminal: characters that it would act upon come out escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
