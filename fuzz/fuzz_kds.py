"""Extensions of the key service: a leaf's profile, or LayoutError, nothing else, for every product line."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial

from fuzz.evidence import evidence
from fuzz.outcome import attempt
from swsnp.abi.snp_report import Product
from swsnp.certs import der
from swsnp.certs.der import Der
from swsnp.certs.kds_extensions import issuing_product, leaf_kind, leaf_profile
from swsnp.certs.x509 import split_hwid
from swsnp.certs.x509_reader import Certificate, read, read_extensions
from swsnp.errors import LayoutError

__all__ = ["one", "seeds"]


@lru_cache(maxsize=1)
def _leaf() -> Certificate:
    return read(evidence().vcek)


def seeds() -> list[bytes]:
    """The SEQUENCE of extensions of a VCEK."""
    tbs = Der(der.unwrap(_leaf().tbs, der.SEQUENCE, "tbs"), "tbs")
    for tag in (der.explicit(0), der.INTEGER, *[der.SEQUENCE] * 5):
        tbs.value(tag, "what stands before the extensions")
    return [tbs.value(der.explicit(3), "extensions")]


def one(data: bytes) -> object:
    """Read the extensions, give them to a leaf, and decode that for each product."""
    extensions, refusal = attempt(lambda: read_extensions(Der(data, "fuzz"), "fuzz"), LayoutError)
    if refusal:
        return refusal
    common, hwid = split_hwid(extensions)
    leaf = _leaf()._replace(template=replace(_leaf().template, extensions=common), hwid=hwid)
    leaf_kind(leaf)
    issuing_product(leaf)
    kinds = []
    for product in Product:
        profile, refusal = attempt(partial(leaf_profile, leaf, product), LayoutError)
        if profile is not None:
            assert len(profile.hwid) == product.hwid_size
            assert profile.tcb_version.decode(product) == profile.tcb
        kinds.append(refusal)
    return tuple(kinds)
