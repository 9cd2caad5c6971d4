"""What a report lacks to be verified, and a key service that completes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from swsnp.abi.kds import ark_name, ask_name, asvk_name
from swsnp.abi.snp_report import AttestationReport, Product, SigningKey, product_of_cpu
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_extensions import issuing_product, leaf_kind, leaf_profile
from swsnp.certs.kds_url import (
    ChainRequest,
    CrlRequest,
    KdsRequest,
    LeafKind,
    VcekRequest,
    VlekRequest,
    vcek_of_report,
)
from swsnp.certs.signature import rsa_signed
from swsnp.certs.x509_reader import read, read_all
from swsnp.errors import InputError, LayoutError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from swsnp.certs.kds_answer import KdsAnswer
    from swsnp.certs.kds_client import KdsClient
    from swsnp.certs.x509_reader import Certificate

__all__ = ["complete_evidence", "get_fitting", "missing_requests"]


def complete_evidence(
    report: bytes, certificates: Iterable[bytes], client: KdsClient, *, product: Product | None = None
) -> tuple[bytes, ...]:
    """Add what is missing: the VCEK, and the CAs above the leaf.

    What was given stays and stands first, so a verifier judges it as it would have. What is added is evidence
    like it and proves nothing by its origin. What cannot be asked for stays missing, and the verifier says
    so: a VLEK, the VCEK of a masked chip, all of a report without a known product line or in no form.

    Args:
        report: 1,184 bytes.
        certificates: each DER or PEM, one or several, as for `swsnp.verify`.
        client: whom to ask.
        product: the caller's knowledge; decides where the report names no product line.

    Returns:
        The given ones; then, in DER, the leaf if it was missing, and ASK (ASVK) with ARK if either was.

    Raises:
        KdsError: the service did not give one of them; see `KdsClient.get`.
        HostError: the cache cannot be used, or urllib3 is not installed.
    """
    given = tuple(certificates)
    answers = get_fitting(missing_requests(report, given, product=product), client)
    return (*given, *(each for answer in answers for each in answer.der))


def get_fitting(requests: Sequence[KdsRequest], client: KdsClient) -> tuple[KdsAnswer, ...]:
    """Answers that belong together: of one product line a leaf, a chain, a list, as far as asked for.

    A service may have other CAs today than when a kept answer came: AMD's replaced the ASK of Genoa in 2022,
    and an imitation has other keys after each start. So when the chain's intermediate did not sign the leaf,
    or its root the list, all are asked for once more. If they still do not fit, the verifier says so.

    Raises:
        KdsError: the service did not give one of them; see `KdsClient.get`.
        HostError: the cache cannot be used, or urllib3 is not installed.
    """
    answers = tuple(client.get(each) for each in requests)
    if not _fit(answers):
        answers = tuple(client.get(each, renew=True) for each in requests)
    return answers


def _fit(answers: Sequence[KdsAnswer]) -> bool:
    chain = next((each for each in answers if isinstance(each.request, ChainRequest)), None)
    if chain is None:
        return True
    intermediate, root = (read(each) for each in chain.der)
    for each in answers:
        if isinstance(each.request, VcekRequest | VlekRequest) and not rsa_signed(
            read(each.body), intermediate
        ):
            return False
        if isinstance(each.request, CrlRequest) and not rsa_signed(read_crl(each.body), root):
            return False
    return rsa_signed(intermediate, root)


def missing_requests(
    report: bytes, certificates: Iterable[bytes], *, product: Product | None = None
) -> tuple[KdsRequest, ...]:
    """What `complete_evidence` would ask for, without asking: the URLs that a refusal can name."""
    try:
        parsed = AttestationReport.parse(report)
    except LayoutError:
        return ()
    present = _readable(certificates)
    product = _product_of(parsed, present, product)
    if product is None:
        return ()
    kind = _kind_of(parsed)
    leaf = _leaf_request(parsed, product, present) if kind == "vcek" else None
    chain = _chain_request(product, kind, present) if kind is not None else None
    return tuple(each for each in (leaf, chain) if each is not None)


def _readable(certificates: Iterable[bytes]) -> list[Certificate]:
    found: list[Certificate] = []
    for each in certificates:
        try:
            found += read_all(each)
        except (InputError, LayoutError):
            continue  # the verifier reads it again and says what is wrong with it
    return found


def _kind_of(report: AttestationReport) -> LeafKind | None:
    kinds: dict[int, LeafKind] = {SigningKey.VCEK: "vcek", SigningKey.VLEK: "vlek"}
    return kinds.get(report.signer_info.signing_key)


def _product_of(
    report: AttestationReport, present: Sequence[Certificate], product: Product | None
) -> Product | None:
    """As the verifier decides it (P9, P10): the report, the caller, the leaf's issuer, CHIP_ID; the first."""
    if report.version >= 3:
        return product_of_cpu(report.cpuid_fam_id, report.cpuid_mod_id) or product
    if product is not None:
        return product
    named = [issuing_product(each) for each in present if leaf_kind(each) == _kind_of(report)]
    if named:
        return named[0]
    turin = any(report.chip_id[:8]) and not any(report.chip_id[8:])
    return Product.TURIN if turin else None


def _leaf_request(
    report: AttestationReport, product: Product, present: Sequence[Certificate]
) -> VcekRequest | None:
    """The VCEK, unless a fitting one is there; of a masked chip any that is there fits."""
    try:
        wanted = vcek_of_report(report, product)
    except (InputError, LayoutError, UsageError):
        return None
    return None if any(_fits(each, wanted) for each in present) else wanted


def _fits(certificate: Certificate, wanted: VcekRequest) -> bool:
    try:
        profile = leaf_profile(certificate, wanted.product)
    except LayoutError:
        return False  # no leaf, or one of another product line
    return profile.hwid == wanted.hwid and profile.tcb_version == wanted.tcb


def _chain_request(product: Product, kind: LeafKind, present: Sequence[Certificate]) -> ChainRequest | None:
    names = {each.subject_cn for each in present}
    issuer = ask_name(product) if kind == "vcek" else asvk_name(product)
    if {issuer, ark_name(product)} <= names:
        return None
    return ChainRequest(product=product, kind=kind)
