"""`swsnp id-block create|check|show`: what a guest owner signs, for QEMU's id-block= and id-auth=."""

from __future__ import annotations

import argparse
import json
import re
from base64 import b64decode, b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from swsnp.abi.snp_launch import IdAuth, IdBlock
from swsnp.cli import BAD_VERDICT, GOOD
from swsnp.cli.arguments import parser
from swsnp.cli.inputs import read
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import InputError, LayoutError, UsageError
from swsnp.measure import id_block

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["run"]

_DIGEST_SIZE: Final = 48
_PROPERTY: Final = re.compile(r"(id-block|id-auth)=([A-Za-z0-9+/=]+)")
_EPILOG: Final = """create prints what snp-create-id-block prints: the two properties of QEMU's sev-snp-guest,
then the digests that reports will carry (base64). Whoever signs with an author key starts
QEMU with author-key-enabled=on as well.

check and show read such output from FILE, - is standard input."""


def run(arguments: Sequence[str]) -> int:
    """The verb."""
    options = _parser().parse_args(arguments)
    code: int = options.act(options)
    return code


def _parser() -> argparse.ArgumentParser:
    command = parser("id-block", epilog=_EPILOG)
    verbs = command.add_subparsers(required=True, metavar="create|check|show")
    create = verbs.add_parser("create", help="make and sign one", allow_abbrev=False)
    create.set_defaults(act=_create)
    add = create.add_argument
    add("--measurement", type=_digest, required=True, metavar="VALUE", help="launch digest, base64 or hex")
    add("--idkey", type=Path, required=True, metavar="PATH", help="ID private key, PEM, P-384")
    add("--authorkey", type=Path, metavar="PATH", help="author private key, PEM, P-384")
    add("--policy", type=_number, default=id_block.DEFAULT_POLICY, metavar="N", help="default: 0x30000")
    add("--family-id", type=_id, default=bytes(16), metavar="HEX", help="16 bytes (default: zeros)")
    add("--image-id", type=_id, default=bytes(16), metavar="HEX", help="16 bytes (default: zeros)")
    add("--guest-svn", type=_number, default=0, metavar="N", help="default: 0")
    check = verbs.add_parser("check", help="whether a launch would take it", allow_abbrev=False)
    check.set_defaults(act=_check)
    check.add_argument("file", metavar="FILE", help="what create printed, or QEMU's options")
    check.add_argument("--measurement", type=_digest, metavar="VALUE", help="launch digest that it is for")
    check.add_argument("--policy", type=_number, metavar="N", help="guest policy that it is for")
    show = verbs.add_parser("show", help="its fields and key digests", allow_abbrev=False)
    show.set_defaults(act=_show)
    show.add_argument("file", metavar="FILE", help="what create printed, or QEMU's options")
    for each in (create, check, show):
        each.add_argument("--json", action="store_true", help="machine-readable output")
    return command


def _number(text: str) -> int:
    return int(text, 0)


def _id(text: str) -> bytes:
    try:
        data = bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted 32 hex digits") from None
    if len(data) != 16:
        raise argparse.ArgumentTypeError(f"got {len(data)} bytes, wanted 16 (AMD 56860, ID block)")
    return data


def _digest(text: str) -> bytes:
    """48 bytes in base64, as the peer takes them, or in hex, as `swsnp measure` prints them."""
    try:
        data = bytes.fromhex(text) if len(text) == 2 * _DIGEST_SIZE else b64decode(text, validate=True)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted a digest in base64 or hex") from None
    if len(data) != _DIGEST_SIZE:
        raise argparse.ArgumentTypeError(f"got {len(data)} bytes, wanted {_DIGEST_SIZE} (AMD 56860, LD)")
    return data


# --- create -------------------------------------------------------------------------------------------------


def _create(options: argparse.Namespace) -> int:
    try:
        block = id_block.make(
            options.measurement,
            policy=options.policy,
            family_id=options.family_id,
            image_id=options.image_id,
            guest_svn=options.guest_svn,
        )
    except LayoutError as error:
        raise UsageError(str(error)) from None
    author_key = None if options.authorkey is None else _key(options.authorkey)
    auth = id_block.sign(block, _key(options.idkey), author_key)
    if options.json:
        print(json.dumps(_as_dict(block, auth), indent=2))
        return GOOD
    print(f"id-block={_base64(bytes(block))},id-auth={_base64(bytes(auth))}")
    print(f"id_key_hash: {_base64(id_block.id_key_digest(auth))}")
    if (digest := id_block.author_key_digest(auth)) is not None:
        print(f"author_key: {_base64(digest)}")
    return GOOD


def _key(path: Path) -> SigningKey:
    try:
        return SigningKey.from_pem(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except LayoutError as error:
        raise InputError(f"{path}: {error}") from None


def _base64(data: bytes) -> str:
    return b64encode(data).decode()


# --- check and show -----------------------------------------------------------------------------------------


def _read(name: str) -> tuple[IdBlock, IdAuth]:
    found = dict(_PROPERTY.findall(read(name, wanted="an ID block").decode("latin-1")))
    parts = []
    for key, size in (("id-block", IdBlock.SIZE), ("id-auth", IdAuth.SIZE)):
        if key not in found:
            raise InputError(f"{name}: no {key}=, wanted id-block=...,id-auth=...")
        try:
            data = b64decode(found[key], validate=True)
        except ValueError:
            raise InputError(f"{name}: {key}: got {found[key][:20]!r}..., wanted base64") from None
        if len(data) > size or (key == "id-block" and len(data) != size):
            raise InputError(f"{name}: {key}: got {len(data)} bytes, wanted {size}")
        parts.append(data.ljust(size, b"\0"))  # QEMU passes a short id-auth on with zeros behind it
    return IdBlock.parse(parts[0]), IdAuth.parse(parts[1])


def _check(options: argparse.Namespace) -> int:
    block, auth = _read(options.file)
    findings = id_block.check(block, auth, measurement=options.measurement, policy=options.policy)
    good = all(each.ok for each in findings)
    if options.json:
        checks = [
            {"check": each.number, "field": each.field, "ok": each.ok, "text": each.text} for each in findings
        ]
        print(json.dumps({"good": good, "checks": checks}, indent=2))
    else:
        for each in findings:
            print(f"{'ok ' if each.ok else 'BAD'} {each.number} {each.field}: {each.text}")
    return GOOD if good else BAD_VERDICT


def _show(options: argparse.Namespace) -> int:
    shown = _as_dict(*_read(options.file))
    if options.json:
        print(json.dumps(shown, indent=2))
        return GOOD
    for key, value in shown.items():
        if key not in ("id_block", "id_auth"):
            print(f"{key + ':':20} {value}")
    return GOOD


def _as_dict(block: IdBlock, auth: IdAuth) -> dict[str, Any]:
    author = id_block.author_key_digest(auth)
    return {
        "measurement": block.ld.hex(),
        "family_id": block.family_id.hex(),
        "image_id": block.image_id.hex(),
        "version": block.version,
        "guest_svn": block.guest_svn,
        "policy": f"{block.policy:#x}",
        "id_key_digest": id_block.id_key_digest(auth).hex(),
        "author_key_digest": None if author is None else author.hex(),
        "id_block": _base64(bytes(block)),
        "id_auth": _base64(bytes(auth)),
    }
