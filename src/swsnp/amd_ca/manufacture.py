"""Certificate hierarchies in the shape of AMD's, under keys of our own.

Every organization name says "swsnp test CA, not AMD" unless AMD's is asked for, and no root made here is ever
among the pinned ones. Source: AMD 57230; the genuine certificates for order and encodings.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from Crypto.Hash import SHA384
from Crypto.PublicKey import RSA
from Crypto.Signature import pss
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.kds import AMD_ORGANIZATION, LEAF_NAMES, ark_name, ask_name, asvk_name
from swsnp.abi.snp_report import Product
from swsnp.amd_ca import assemble
from swsnp.certs.table import TableEntry, pack
from swsnp.certs.x509_reader import to_pem
from swsnp.crypto.derive import SeededEntropy
from swsnp.errors import LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from swsnp.abi.snp_report import TcbVersion

__all__ = ["CRL_HOST", "Hierarchy", "LeafKind", "RSA_BITS", "TEST_ORGANIZATION", "utc_now"]

LeafKind: TypeAlias = Literal["vcek", "vlek"]
TEST_ORGANIZATION: Final = "swsnp test CA, not AMD"
CRL_HOST: Final = "kds.swsnp.invalid"
"""RFC 2606: no name under .invalid is ever resolved."""
_AMD_CRL_HOST: Final = "kdsintf.amd.com"
_CA_YEARS: Final = 25
_LEAF_YEARS: Final = {"vcek": 7, "vlek": 1}
_BACKDATED: Final = timedelta(days=1)
_CRL_YEARS: Final = 1
_SALT: Final = 48
RSA_BITS: Final = 4096
_COORDINATE: Final = 48
_SEED: Final = 48
_SERIALS: Final = {
    Product.MILAN: (0x10000, 0x10001, 0x10101),
    Product.GENOA: (0x20000, 0x20002, 0x20101),
    Product.TURIN: (0x30000, 0x30001, 0x30101),
}
"""ARK, ASK, ASVK. Genoa's first ASK, 20001, was revoked."""


def utc_now() -> datetime:
    """The present, aware."""
    return datetime.now(UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Authority:
    """A CA: its key, its name and key identifier, its certificate."""

    key: RSA.RsaKey = field(repr=False)
    name: bytes
    key_id: bytes
    certificate: bytes


class Hierarchy:
    """ARK, ASK and ASVK of one product line, and the leaves that they issue.

    Keys are made when they are first needed (about a second each); the ASVK only for a VLEK.
    All randomness is drawn as four seeds in the constructor, so what is asked for later, and in which order,
    changes no byte: with equal `entropy` and `now`, two processes issue equal certificates. Threads may share
    a hierarchy.
    """

    def __init__(
        self,
        product: Product,
        *,
        entropy: Callable[[int], bytes] | None = None,
        now: Callable[[], datetime] = utc_now,
        amd_names: bool = False,
    ) -> None:
        """Prepare a hierarchy.

        Args:
            product: Milan, Genoa or Turin.
            entropy: gives n random bytes; called four times, here only. None: the system's, and keys by
                OpenSSL, which makes them faster than the library that takes a random source.
            now: aware UTC; read once here for the CAs, and once for each leaf and CRL.
            amd_names: AMD's organization name and CRL host, for programs that look; the keys stay ours.
        """
        self._product = product
        self._now = now
        self._seeded = entropy is not None
        self._seeds = [SeededEntropy((entropy or os.urandom)(_SEED)) for _ in range(4)]
        self._created = _moment(now)
        self._authorities: dict[int, _Authority] = {}
        self._lock = threading.RLock()
        self._organization = AMD_ORGANIZATION if amd_names else TEST_ORGANIZATION
        self._crl_host = _AMD_CRL_HOST if amd_names else CRL_HOST

    def __repr__(self) -> str:
        return f"Hierarchy({self._product.value}, {self._organization!r})"

    @property
    def product(self) -> Product:
        """The product line."""
        return self._product

    @property
    def ark(self) -> bytes:
        """The root's certificate, DER."""
        return self._ark.certificate

    @property
    def ask(self) -> bytes:
        """Certificate of the CA that signs VCEKs, DER."""
        return self._ask.certificate

    @property
    def asvk(self) -> bytes:
        """Certificate of the CA that signs VLEKs, DER."""
        return self._asvk.certificate

    def vcek(self, x: bytes, y: bytes, hwid: bytes, tcb: TcbVersion) -> bytes:
        """Issue a chip's certificate, DER.

        Args:
            x: public point, big-endian, 48 bytes.
            y: likewise.
            hwid: the chip id: 64 bytes, 8 for Turin.
            tcb: patch levels, in the product's layout.

        Raises:
            LayoutError: a coordinate or HWID of another size.
        """
        if len(hwid) != self._product.hwid_size:
            raise LayoutError(
                f"HWID: got {len(hwid)} bytes, wanted {self._product.hwid_size} for {self._product.value} "
                "(AMD 57230)"
            )
        shown = "Milan-B0" if self._product is Product.MILAN else self._product.value
        extensions = assemble.leaf_extensions(self._product, shown, tcb, hwid=hwid, csp_id=None)
        return self._leaf("vcek", self._ask, x, y, extensions)

    def vlek(self, x: bytes, y: bytes, csp_id: str, tcb: TcbVersion) -> bytes:
        """Issue a provider's certificate, DER; `csp_id` such as "CN=cc-eu-west-1.example".

        Raises:
            LayoutError: a coordinate that is not 48 bytes, or a CSP id outside ASCII.
        """
        if not csp_id.isascii():
            raise LayoutError(f"CSP id: got {csp_id!r}, wanted ASCII (AMD 57230, IA5String)")
        extensions = assemble.leaf_extensions(
            self._product, self._product.value, tcb, hwid=None, csp_id=csp_id
        )
        return self._leaf("vlek", self._asvk, x, y, extensions)

    def chain_pem(self, kind: LeafKind = "vcek") -> bytes:
        """ASK (or ASVK), then ARK: what the key service's cert_chain answers."""
        return to_pem(self._intermediate(kind)) + to_pem(self.ark)

    def table(
        self, *, vcek: bytes | None = None, vlek: bytes | None = None, crl: bytes | None = None
    ) -> bytes:
        """The certificate table with a leaf, its ASK or ASVK, the ARK and perhaps a CRL; all DER.

        Raises:
            UsageError: not exactly one leaf. One GUID stands for ASK and ASVK, so a table holds one chain.
        """
        if (vcek is None) == (vlek is None):
            raise UsageError("certificate table: wanted either a VCEK or a VLEK")
        if vcek is not None:
            entries = [TableEntry(guid=CertTableGuid.VCEK, data=vcek)]
        else:
            entries = [TableEntry(guid=CertTableGuid.VLEK, data=vlek or b"")]
        issuer = self.ask if vcek is not None else self.asvk
        entries += [
            TableEntry(guid=CertTableGuid.ASK, data=issuer),
            TableEntry(guid=CertTableGuid.ARK, data=self.ark),
        ]
        if crl is not None:
            entries.append(TableEntry(guid=CertTableGuid.CRL, data=crl))
        return pack(entries)

    def crl(
        self, revoked: Iterable[int] = (), *, number: int = 1, this_update: datetime | None = None
    ) -> bytes:
        """Issue a CRL, DER: signed by the ARK, good for a year.

        Args:
            revoked: serial numbers of ASKs or ASVKs.
            number: the CRL number; a later CRL has a greater one.
            this_update: when it counts as issued; now by default. More than a year ago, it is a stale one.
        """
        ark = self._ark
        now = _moment(self._now if this_update is None else lambda: this_update)
        tbs = assemble.crl_tbs(
            ark.name,
            ark.key_id,
            number=number,
            this_update=now,
            next_update=_years_later(now, _CRL_YEARS),
            revoked=revoked,
        )
        return self._sign(ark.key, tbs, assemble.PSS)

    @property
    def _ark(self) -> _Authority:
        return self._once(0, lambda: self._authority(0, ark_name(self._product), "vcek", None))

    @property
    def _ask(self) -> _Authority:
        return self._once(1, lambda: self._authority(1, ask_name(self._product), "vcek", self._ark))

    @property
    def _asvk(self) -> _Authority:
        return self._once(2, lambda: self._authority(2, asvk_name(self._product), "vlek", self._ark))

    def _once(self, role: int, make: Callable[[], _Authority]) -> _Authority:
        """Each authority is made by one thread: two that ask at once must not get two keys."""
        with self._lock:
            if role not in self._authorities:
                self._authorities[role] = make()
            return self._authorities[role]

    def _intermediate(self, kind: LeafKind) -> bytes:
        if kind not in LEAF_NAMES:
            raise UsageError(f"chain: got {kind!r}, wanted 'vcek' or 'vlek'")
        return self.ask if kind == "vcek" else self.asvk

    def _authority(self, role: int, common_name: str, path: str, issuer: _Authority | None) -> _Authority:
        key = self._new_key(role)
        spki, public = assemble.rsa_spki(int(key.n), int(key.e))
        key_id = hashlib.sha1(public, usedforsecurity=False).digest()  # RFC 5280, 4.2.1.2, method 1
        subject = assemble.name(common_name, self._organization)
        crl_url = f"https://{self._crl_host}/{path}/v1/{self._product.value}/crl"
        if issuer is None:
            extensions = assemble.root_extensions(key_id, crl_url)
        else:
            extensions = assemble.ca_extensions(key_id, issuer.key_id, crl_url)
        # backdated like the leaves, so that a leaf's whole validity lies inside that of its issuers
        not_before = self._created - _BACKDATED
        tbs = assemble.Tbs(
            serial=_SERIALS[self._product][role],
            algorithm=assemble.PSS_EXPLICIT,
            issuer=subject if issuer is None else issuer.name,
            subject=subject,
            not_before=not_before,
            not_after=_years_later(not_before, _CA_YEARS),
            spki=spki,
            extensions=extensions,
        )
        signer = key if issuer is None else issuer.key
        certificate = self._sign(signer, assemble.tbs_certificate(tbs), tbs.algorithm)
        return _Authority(key=key, name=subject, key_id=key_id, certificate=certificate)

    def _new_key(self, role: int) -> RSA.RsaKey:
        if self._seeded:
            return RSA.generate(RSA_BITS, randfunc=self._seeds[role])
        made = rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)
        form = (Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        return RSA.import_key(made.private_bytes(*form))

    def _leaf(
        self, kind: LeafKind, issuer: _Authority, x: bytes, y: bytes, extensions: tuple[bytes, ...]
    ) -> bytes:
        if len(x) != _COORDINATE or len(y) != _COORDINATE:
            raise LayoutError(f"public point: got {len(x)} and {len(y)} bytes, wanted 48 each (P-384)")
        not_before = _moment(self._now) - _BACKDATED
        tbs = assemble.Tbs(
            serial=0,
            algorithm=assemble.PSS,
            issuer=issuer.name,
            subject=assemble.name(LEAF_NAMES[kind], self._organization),
            not_before=not_before,
            not_after=_years_later(not_before, _LEAF_YEARS[kind]),
            spki=assemble.ec_spki(x, y),
            extensions=extensions,
        )
        return self._sign(issuer.key, assemble.tbs_certificate(tbs), tbs.algorithm)

    def _sign(self, key: RSA.RsaKey, tbs: bytes, algorithm: bytes) -> bytes:
        digest = SHA384.new(tbs)
        # the salt depends on the seed and on what is signed: secret, never shared by two texts, repeatable
        salt = self._seeds[3].child(digest.hexdigest())
        signature = pss.new(key, salt_bytes=_SALT, rand_func=salt).sign(digest)
        return assemble.signed(tbs, algorithm, signature)


def _moment(now: Callable[[], datetime]) -> datetime:
    """The clock's time to the second; certificates hold no more.

    Raises:
        UsageError: the clock gives a time without a zone.
    """
    moment = now()
    if moment.tzinfo is None:
        raise UsageError(f"clock: got {moment} without a time zone, wanted aware UTC")
    return moment.astimezone(UTC).replace(microsecond=0)


def _years_later(moment: datetime, years: int) -> datetime:
    """The same day that many years on; 29 February becomes 1 March where there is none."""
    try:
        return moment.replace(year=moment.year + years)
    except ValueError:
        return moment.replace(year=moment.year + years, month=3, day=1)
