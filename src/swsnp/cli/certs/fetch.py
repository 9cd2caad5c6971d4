"""`swsnp certs fetch`: a chip's certificates from the key service, as files or as a certificate table."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from swsnp.abi.snp_report import AttestationReport, SigningKey
from swsnp.certs.chip_words import read_hwid, read_tcb
from swsnp.certs.kds_extensions import issuing_product, leaf_kind, leaf_profile
from swsnp.certs.kds_url import ChainRequest, CrlRequest, LeafKind, VcekRequest, vcek_of_report
from swsnp.certs.x509_reader import read as read_certificate
from swsnp.certs.x509_reader import to_pem
from swsnp.cli import GOOD, common
from swsnp.cli.certs import parser
from swsnp.cli.inputs import read, read_report
from swsnp.cli.kds_options import PRODUCTS, add_client, client_of, product_of
from swsnp.errors import InputError, UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from swsnp.abi.snp_report import Product
    from swsnp.certs.kds_client import KdsClient
    from swsnp.certs.kds_url import KdsRequest

__all__ = ["run"]

_EPILOG = """\
Name the chip by a report, or by product, chip id and patch levels:
  --report report.bin
  --product milan --chip-id 0a1b… --tcb bl=4,tee=0,snp=24,ucode=219
The key service gives a VLEK to its provider only: with --vlek FILE its chain is fetched.
--urls asks nobody: it prints what would be asked, for whoever has a network.

Nothing here is judged: `swsnp certs check` and `swsnp verify` do that, against roots of their own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A leaf to ask for, or one that was given; and what goes with it."""

    product: Product
    kind: LeafKind
    leaf: VcekRequest | bytes
    crl: bool

    def requests(self) -> tuple[KdsRequest, ...]:
        """Leaf if it has to be asked for, chain, list if wanted."""
        asked: list[KdsRequest] = [self.leaf] if isinstance(self.leaf, VcekRequest) else []
        asked.append(ChainRequest(product=self.product, kind=self.kind))
        if self.crl:
            asked.append(CrlRequest(product=self.product, kind=self.kind))
        return tuple(asked)


def run(arguments: Sequence[str]) -> int:
    """The sub-verb."""
    options = _options(arguments)
    wanted = _wanted(options)
    client = client_of(options)
    urls = [client.url_of(each) for each in wanted.requests()]
    if options.urls:
        print(json.dumps({"urls": urls}, indent=2) if options.json else "\n".join(urls))
        return GOOD
    found = _fetch(wanted, client)
    if options.out is not None:
        written = _write_blob(found, options)
    else:
        written = _write_files(found, wanted.kind, options.out_dir)
    if options.json:
        print(
            json.dumps({"urls": urls, "files": {str(path): size for path, size in written.items()}}, indent=2)
        )
    else:
        print("\n".join(f"{path}: {size} bytes" for path, size in written.items()))
    return GOOD


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("fetch", epilog=_EPILOG)
    command.add_argument(
        "--report", metavar="FILE", help="the report whose certificates are wanted; - is stdin"
    )
    command.add_argument("--product", choices=PRODUCTS, help="product line, where no report says it")
    command.add_argument("--chip-id", metavar="HEX", help="64 bytes; of Turin the first 8 will do")
    command.add_argument("--tcb", metavar="LEVELS", help="bl=N,tee=N,snp=N,ucode=N; for Turin also fmc=N")
    command.add_argument("--vlek", metavar="FILE", help="a VLEK (DER or PEM) whose chain is wanted")
    command.add_argument("--crl", action="store_true", help="the revocation list too")
    out = command.add_mutually_exclusive_group(required=True)
    out.add_argument("--out", type=Path, metavar="BLOB", help="write a certificate table")
    out.add_argument("--out-dir", type=Path, metavar="DIR", help="write DER files, and the chain in PEM")
    out.add_argument("--urls", action="store_true", help="print URLs, fetch nothing")
    common.add_lock_timeout(command)
    add_client(command)
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command.parse_args(arguments)


def _wanted(options: argparse.Namespace) -> _Wanted:
    product = product_of(options.product)
    if options.report is not None and (options.chip_id is not None or options.tcb is not None):
        raise UsageError("--report names chip and TCB; leave out --chip-id and --tcb")
    if options.vlek is not None:
        return _of_vlek(options, product)
    if options.report is not None:
        request = vcek_of_report(_report(options.report, SigningKey.VCEK), product)
    elif product is None or options.chip_id is None or options.tcb is None:
        raise UsageError("wanted --report, or --product with --chip-id and --tcb, or --vlek")
    else:
        hwid, tcb = read_hwid(options.chip_id, product), read_tcb(options.tcb, product)
        request = VcekRequest(product=product, hwid=hwid, tcb=tcb)
    return _Wanted(product=request.product, kind="vcek", leaf=request, crl=options.crl)


def _report(name: str, wanted: SigningKey) -> AttestationReport:
    report = AttestationReport.parse(read_report(name))
    key = report.signer_info.signing_key
    if key != wanted and SigningKey.VLEK in (key, wanted):
        raise InputError(
            f"{name}: SIGNING_KEY is {key}, wanted {wanted:d} ({wanted.name}); a VLEK comes with the "
            "certificate table, name it with --vlek"
        )
    return report


def _of_vlek(options: argparse.Namespace, product: Product | None) -> _Wanted:
    if options.chip_id is not None or options.tcb is not None:
        raise UsageError("--vlek stands for itself; leave out --chip-id and --tcb")
    leaf = read_certificate(read(options.vlek, wanted="a VLEK"))
    found = issuing_product(leaf)
    if leaf_kind(leaf) != "vlek" or found is None:
        raise InputError(
            f"{options.vlek}: got {leaf.subject_cn!r} by {leaf.issuer_cn!r}, "
            "wanted SEV-VLEK by SEV-VLEK-PRODUCT"
        )
    if product not in (None, found):
        raise UsageError(f"--product: got {options.product}, {options.vlek} is of {found.value}")
    if options.report is not None:
        tcb = leaf_profile(leaf, found).tcb_version
        reported = _report(options.report, SigningKey.VLEK).reported_tcb
        if tcb != reported:
            raise InputError(f"{options.vlek}: its TCB is {tcb:#018x}, wanted the report's {reported:#018x}")
    return _Wanted(product=found, kind="vlek", leaf=leaf.der, crl=options.crl)


def _fetch(wanted: _Wanted, client: KdsClient) -> dict[str, bytes]:
    """By role: leaf, ask, ark, crl; in DER."""
    from swsnp.certs.kds_evidence import get_fitting

    found = {} if isinstance(wanted.leaf, VcekRequest) else {"leaf": wanted.leaf}
    for answer in get_fitting(wanted.requests(), client):
        match answer.request:
            case ChainRequest():
                found["ask"], found["ark"] = answer.der
            case CrlRequest():
                found["crl"] = answer.body
            case _:
                found["leaf"] = answer.body
    return found


def _write_blob(found: dict[str, bytes], options: argparse.Namespace) -> dict[Path, int]:
    """A table in AMD's order, put where VMMs read it, under the lock that they respect."""
    from swsnp.certs.blob_file import replace
    from swsnp.certs.build import build_table

    blob = build_table(found.items())
    replace(options.out, blob, timeout_s=options.lock_timeout)
    return {options.out: len(blob)}


def _write_files(found: dict[str, bytes], kind: LeafKind, folder: Path) -> dict[Path, int]:
    """Under the names that AMD's and virtee's tools use; the chain again in PEM, as the service has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: cannot be made: {error.strerror}") from None
    names = {"leaf": kind, "ask": "ask" if kind == "vcek" else "asvk", "ark": "ark", "crl": "crl"}
    files = {folder / f"{names[role]}.der": data for role, data in found.items()}
    files[folder / "cert_chain.pem"] = to_pem(found["ask"]) + to_pem(found["ark"])
    for path, data in files.items():
        common.save(path, data)
    return {path: len(data) for path, data in files.items()}
