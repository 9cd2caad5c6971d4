"""What `swsnp verify` judges and what it judges by, read from the files that the command line names."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.ghcb import CertTableGuid
from swsnp.certs.classify import classify
from swsnp.certs.crl import read_crl
from swsnp.certs.kds_extensions import issuing_product, leaf_kind
from swsnp.certs.table import canonical_guid, parse
from swsnp.certs.x509_reader import read_all
from swsnp.cli.inputs import read
from swsnp.errors import InputError, LayoutError, UsageError
from swsnp.verify import Policy, Roots

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from swsnp.abi.snp_report import Product
    from swsnp.certs.classify import Classified
    from swsnp.certs.kds_client import KdsClient
    from swsnp.certs.kds_url import LeafKind
    from swsnp.certs.x509_reader import Certificate

__all__ = [
    "Evidence",
    "Service",
    "complete",
    "gather",
    "gather_common",
    "given",
    "service_of",
    "wanted_list",
]

_CERTIFICATES: Final = (CertTableGuid.VCEK, CertTableGuid.VLEK, CertTableGuid.ASK, CertTableGuid.ARK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Everything that was read. `inputs` names each file with its form and hash, for the result."""

    roots: Roots
    policy: Policy
    report: bytes = field(default=b"", repr=False)
    certificates: tuple[bytes, ...] = field(default=(), repr=False)
    table: bytes | None = field(default=None, repr=False)
    crls: tuple[bytes, ...] = field(default=(), repr=False)
    inputs: tuple[dict[str, Any], ...] = ()


def gather(options: argparse.Namespace) -> Evidence:
    """Read the report and everything that goes with it.

    Raises:
        InputError: a file that cannot be read, or does not hold what its option wants.
        UsageError: two certificate tables.
    """
    data = read(options.report)
    found = classify(data, options.report)
    if found.report is None:
        raise InputError(f"{options.report}: got {found.form}, wanted a report")
    evidence = gather_common(options)
    told = _told("report", options.report, found.form, data)
    return replace(evidence, report=found.report, inputs=(told, *evidence.inputs))


def gather_common(options: argparse.Namespace) -> Evidence:
    """Read what holds for every report: certificates, lists, roots and policy; see `gather`."""
    files = [_read(option, name) for option in _WANTED for name in getattr(options, option) or ()]
    tables = [each.content.table for each in files if each.content.table is not None]
    if len(tables) > 1:
        raise UsageError(f"got {len(tables)} certificate tables, wanted one")
    roots, told_roots = _roots(options.roots)
    policy, told_policy = _policy(options.policy)
    return Evidence(
        roots=roots,
        policy=policy,
        certificates=tuple(der for each in files for der in each.content.certificates),
        table=tables[0] if tables else None,
        crls=tuple(der for each in files for der in each.content.crls),
        inputs=(*(each.told for each in files), *told_roots, *told_policy),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The key service that `--kds` names; can be sent to another process."""

    base: str
    folder: Path | None = None
    offline: bool = False

    def client(self) -> KdsClient:
        """Who asks it."""
        from swsnp.certs.kds_cache import DiskCache, default_folder
        from swsnp.certs.kds_client import KdsClient

        return KdsClient(DiskCache(self.folder or default_folder()), base=self.base, offline=self.offline)


def service_of(options: argparse.Namespace) -> Service | None:
    """What the command line says; None without `--kds`. UsageError for an address that is no service's."""
    if options.kds is None:
        return None
    from swsnp.certs.kds_url import base_of

    return Service(base=base_of(options.kds), folder=options.cache, offline=options.offline)


@dataclass(frozen=True, slots=True)
class _File:
    """One file that was read: what is in it, and what is told of it."""

    content: Classified
    told: dict[str, Any]


def _read(option: str, name: str) -> _File:
    wanted, holds = _WANTED[option]
    data = read(name, wanted=wanted)
    content = classify(data, name)
    try:
        if not holds(content):
            raise InputError(f"got {_what(content)}, wanted {wanted} (--{option})")
    except (InputError, LayoutError) as error:
        raise InputError(f"{name}: {error}") from None
    return _File(content, _told(option, name, content.form, data))


def _kinds(content: Classified) -> list[str]:
    """The kind of every certificate: "vcek", "vlek" or "ca".

    Raises:
        InputError: one that cannot be read.
        LayoutError: likewise.
    """
    return [leaf_kind(each) or "ca" for der in content.certificates for each in read_all(der)]


def _what(content: Classified) -> str:
    if not content.certificates:
        return str(content.form)
    return f"{content.form} with {', '.join(_NAMES[kind] for kind in _kinds(content))}"


def _lists(content: Classified) -> int:
    return len([read_crl(each) for each in content.crls])


_NAMES: Final = {"vcek": "a VCEK", "vlek": "a VLEK", "ca": "no leaf"}
_WANTED: Final[dict[str, tuple[str, Callable[[Classified], object]]]] = {
    "certs": ("certificates", lambda content: content.table is not None or _kinds(content)),
    "vcek": ("a VCEK", lambda content: "vcek" in _kinds(content)),
    "vlek": ("a VLEK", lambda content: "vlek" in _kinds(content)),
    "chain": ("certificates of ASK or ASVK and ARK", lambda content: "ca" in _kinds(content)),
    "crl": ("a revocation list", _lists),
}
"""Option to what its file has to hold, for people and as a rule."""


def _roots(names: list[str] | None) -> tuple[Roots, list[dict[str, Any]]]:
    if not names:
        return Roots.amd(), []
    found: list[bytes] = []
    told = []
    for name in names:
        data = read(name, wanted="certificates of roots")
        content = classify(data, name)
        if not content.certificates:
            raise InputError(f"{name}: got {content.form}, wanted certificates of roots (--roots)")
        try:
            Roots.of(*content.certificates)
        except (InputError, LayoutError) as error:
            raise InputError(f"{name}: {error} (--roots)") from None
        found += content.certificates
        told.append(_told("roots", name, content.form, data))
    return Roots.of(*found), told


def _policy(name: str | None) -> tuple[Policy, list[dict[str, Any]]]:
    if name is None:
        return Policy(), []
    from swsnp.verify.policy_file import read_policy

    data = read(name, wanted="a policy")
    return read_policy(data, name), [_told("policy", name, "policy", data)]


def _told(option: str, name: str, form: str, data: bytes) -> dict[str, Any]:
    return {"option": option, "file": name, "form": str(form), "sha256": hashlib.sha256(data).hexdigest()}


def given(evidence: Evidence) -> tuple[bytes, ...]:
    """Every certificate of the evidence, those in the table too as far as it can be read."""
    try:
        entries = parse(evidence.table) if evidence.table is not None else ()
    except LayoutError:
        entries = ()  # the verifier reads it again and says what is wrong with it
    return (
        *evidence.certificates,
        *(each.data for each in entries if canonical_guid(each.guid) in _CERTIFICATES),
    )


def complete(evidence: Evidence, options: argparse.Namespace) -> Evidence:
    """With `--kds`, add what is missing from the key service or its cache; without, return the same.

    A revocation list is fetched only where the policy requires one and none was given.

    Raises:
        HostError: the service gives nothing now, or the network must not be used and nothing was kept.
        InputError: it answers with something else than what was asked for.
        KdsError: it has no such certificate.
    """
    service = service_of(options)
    if service is None:
        return evidence
    from swsnp.certs.kds_evidence import complete_evidence

    client = service.client()
    before = given(evidence)
    found = complete_evidence(evidence.report, before, client, product=options.product)
    more = found[len(before) :]
    told = [_told("kds", service.base, "DER certificate", each) for each in more]
    evidence = replace(
        evidence, certificates=(*evidence.certificates, *more), inputs=(*evidence.inputs, *told)
    )
    wanted = wanted_list(evidence)
    if wanted is None:
        return evidence
    crl = client.crl(*wanted)
    told = [_told("kds", service.base, "DER CRL", crl)]
    return replace(evidence, crls=(crl,), inputs=(*evidence.inputs, *told))


def wanted_list(evidence: Evidence) -> tuple[Product, LeafKind] | None:
    """Whose revocation list is to be fetched; None where the policy requires none, or one was given."""
    if not evidence.policy.require_crl or evidence.crls:
        return None
    leaf = next((each for der in given(evidence) for each in _readable(der) if leaf_kind(each)), None)
    if leaf is None or (product := issuing_product(leaf)) is None:
        return None
    return product, "vlek" if leaf_kind(leaf) == "vlek" else "vcek"


def _readable(data: bytes) -> tuple[Certificate, ...]:
    try:
        return read_all(data)
    except (InputError, LayoutError):
        return ()  # the verifier reads it again and says what is wrong with it
