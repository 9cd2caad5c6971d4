"""`swsnp certs make`: an emulated hierarchy and blob, for authors of VMMs and relying parties' tests."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from swsnp.abi.snp_report import Product
from swsnp.cli import GOOD, common
from swsnp.cli.certs import parser
from swsnp.errors import UsageError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from swsnp.abi.snp_report import TcbVersion
    from swsnp.machine import Machine

__all__ = ["run"]

_EPILOG: Final = """\
Without --chip-id and --tcb the leaf is that of the machine which `swsnp vm --seed S` and
`swsnp demo --seed S` emulate, so its reports verify with this blob. With them it is for
that chip, under a key of its own, which --key keeps: sign reports of your own with it.
Software keys under this project's names: no one who trusts AMD's roots trusts them."""
_SCALAR_MATERIAL: Final = 56
"""Bytes of randomness for a scalar of P-384: 64 bits more than the order has, as FIPS 186-5 asks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Made:
    """Certificates in DER; `key` is the leaf's private key in PEM where it may be told."""

    leaf_name: str
    leaf: bytes
    issuer_name: str
    issuer: bytes
    root: bytes
    crl: bytes | None
    key: bytes | None = field(default=None, repr=False)


def run(arguments: Sequence[str], *, entropy: Callable[[int], bytes] = os.urandom) -> int:
    """The sub-verb."""
    options = _options(arguments)
    from swsnp.certs.blob_file import replace
    from swsnp.certs.build import build_table
    from swsnp.certs.x509_reader import to_pem

    made = _make(options, entropy)
    parts = {f"{made.leaf_name}.der": made.leaf, f"{made.issuer_name}.der": made.issuer, "ark.der": made.root}
    parts |= {} if made.crl is None else {"crl.der": made.crl}
    blob = build_table(parts.items())
    wanted = {} if options.out is None else {Path(options.out): blob}
    if options.out_dir is not None:
        parts |= {"cert_chain": to_pem(made.issuer) + to_pem(made.root), "certs.blob": blob}
        folder = common.folder(options.out_dir)
        wanted |= {folder / name: data for name, data in parts.items()}
    for path, data in wanted.items():
        replace(path, data, timeout_s=options.lock_timeout)
    written = [str(path) for path in wanted]
    if options.key is not None and made.key is not None:
        common.save(Path(options.key), made.key)  # as a temporary file it was, and stays, the owner's alone
        written.append(options.key)
    print(json.dumps({"files": written, "size": len(blob)}) if options.json else "\n".join(written))
    return GOOD


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    command = parser("make", epilog=_EPILOG)
    command.add_argument(
        "--product",
        type=str.lower,
        default="milan",
        choices=[each.value.lower() for each in Product],
        help="which chip (default: milan)",
    )
    common.add_seed(command)
    command.add_argument(
        "--amd-names", action="store_true", help="AMD's names in the certificates; the keys stay our own"
    )
    command.add_argument("--chip-id", metavar="HEX", help="64 bytes; for Turin 8")
    command.add_argument("--tcb", metavar="LEVELS", help="bl=N,tee=N,snp=N,ucode=N; for Turin also fmc=N")
    command.add_argument("--vlek", metavar="CSP-ID", help="a VLEK of that provider instead of a VCEK")
    command.add_argument("--crl", action="store_true", help="an empty revocation list too")
    command.add_argument("--out", metavar="BLOB", help="where to put the certificate table")
    command.add_argument("--out-dir", metavar="DIR", help="where to put the table and each certificate")
    command.add_argument("--key", metavar="FILE", help="where to put the leaf's private key, PEM")
    common.add_lock_timeout(command)
    command.add_argument("--json", action="store_true", help="machine-readable output")
    options = command.parse_args(arguments)
    if options.out is None and options.out_dir is None:
        raise UsageError("wanted --out, --out-dir or both")
    if options.vlek is not None and options.chip_id is not None:
        raise UsageError("--vlek: a VLEK names no chip; leave out --chip-id")
    if (options.tcb is None) is not (options.chip_id is None) and options.vlek is None:
        raise UsageError("--chip-id and --tcb go together; without them it is the emulated machine's chip")
    if options.key is not None and options.tcb is None:
        raise UsageError(
            "--key: the emulated machine's key stays in it; wanted --tcb, with --chip-id or --vlek"
        )
    return options


def _make(options: argparse.Namespace, entropy: Callable[[int], bytes]) -> _Made:
    from swsnp.machine import Machine

    product = Product(options.product.capitalize())
    machine = Machine(product=product, seed=common.seed_of(options), amd_names=options.amd_names)
    if options.tcb is not None:
        leaf, key = _foreign_leaf(options, machine, entropy)
    elif options.vlek is not None:
        leaf, key = machine.vlek(options.vlek).certificate, None
    else:
        leaf, key = machine.vcek_certificate(), None
    hierarchy = machine.hierarchy
    kind, issuer = ("vcek", hierarchy.ask) if options.vlek is None else ("vlek", hierarchy.asvk)
    crl = hierarchy.crl() if options.crl else None
    return _Made(
        leaf_name=kind,
        leaf=leaf,
        issuer_name="ask" if kind == "vcek" else "asvk",
        issuer=issuer,
        root=hierarchy.ark,
        crl=crl,
        key=key,
    )


def _foreign_leaf(
    options: argparse.Namespace, machine: Machine, entropy: Callable[[int], bytes]
) -> tuple[bytes, bytes]:
    """A leaf for a chip or TCB that the machine has not, and its private key."""
    from swsnp.certs.chip_words import read_hwid, read_tcb
    from swsnp.crypto.derive import SeededEntropy, p384_scalar
    from swsnp.crypto.ecdsa import SigningKey

    tcb: TcbVersion = read_tcb(options.tcb, machine.product)
    hwid = b"" if options.chip_id is None else read_hwid(options.chip_id, machine.product)
    seed = common.seed_of(options)
    if seed is not None:
        entropy = SeededEntropy(seed).child(f"certs make/{hwid.hex()}/{options.vlek}/{tcb:x}")
    scalar = p384_scalar(entropy(_SCALAR_MATERIAL))
    point = SigningKey.from_scalar(scalar).public_point
    if options.vlek is not None:
        return machine.hierarchy.vlek(*point, options.vlek, tcb), _private_pem(scalar)
    return machine.hierarchy.vcek(*point, hwid, tcb), _private_pem(scalar)


def _private_pem(scalar: int) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ec.derive_private_key(scalar, ec.SECP384R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
