"""`swsnp id-block`: create, check, show, against snp-create-id-block."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from base64 import b64decode, b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from swsnp.abi.snp_launch import IdAuth, IdBlock
from swsnp.cli import main
from swsnp.crypto.ecdsa import SigningKey
from swsnp.measure import id_block

if TYPE_CHECKING:
    from tests.conftest import Skip

LD = bytes(range(48))
KEYS = {"id.pem": 0x1234, "author.pem": 0x5678}
ID_KEY, AUTHOR = (SigningKey.from_scalar(each) for each in KEYS.values())
CREATE = ["create", "--measurement", LD.hex(), "--idkey", "id.pem"]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, scalar in KEYS.items():
        key = ec.derive_private_key(scalar, ec.SECP384R1())
        form = serialization.PrivateFormat.PKCS8
        text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
        Path(name).write_bytes(text)


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["id-block", *words]) == code
    return capsys.readouterr().out


def properties(text: str) -> tuple[IdBlock, IdAuth]:
    found = re.match(r"id-block=(\S+),id-auth=(\S+)$", text.splitlines()[0])
    assert found is not None
    return IdBlock.parse(b64decode(found[1])), IdAuth.parse(b64decode(found[2]))


def made(**given: Any) -> tuple[IdBlock, IdAuth]:
    block = id_block.make(LD, **given)
    return block, id_block.sign(block, ID_KEY, AUTHOR)


def write(name: str, block: bytes, auth: bytes) -> None:
    properties = ",".join(
        f"{key}={b64encode(value).decode()}" for key, value in (("id-block", block), ("id-auth", auth))
    )
    Path(name).write_text(f"-object sev-snp-guest,id=sev0,{properties},policy=0x30000\n")


def test_create(capsys: pytest.CaptureFixture[str]) -> None:
    """Two properties for QEMU, and the digest of the ID key."""
    out = printed(capsys, *CREATE)
    block, auth = properties(out)
    assert block == id_block.make(LD)
    assert all(each.ok for each in id_block.check(block, auth, measurement=LD, policy=0x30000))
    assert out.splitlines()[1:] == [f"id_key_hash: {b64encode(id_block.id_key_digest(auth)).decode()}"]


def test_create_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """Every field of the block, and an author key; the measurement in base64."""
    words = ["--policy", "0xb0000", "--guest-svn", "3", "--authorkey", "author.pem", "--family-id"]
    words += ["66" * 16, "--image-id", "69" * 16, "--measurement", b64encode(LD).decode()]
    out = printed(capsys, *CREATE, *words)
    block, auth = properties(out)
    assert block == id_block.make(LD, policy=0xB0000, guest_svn=3, family_id=b"f" * 16, image_id=b"i" * 16)
    digest = id_block.author_key_digest(auth)
    assert digest is not None
    assert out.splitlines()[2] == f"author_key: {b64encode(digest).decode()}"


def test_like_the_peer(capsys: pytest.CaptureFixture[str], cannot_run: Skip) -> None:
    """snp-create-id-block: the same lines, block, keys and digests; each other's signatures hold."""
    program = Path(sys.executable).with_name("snp-create-id-block")
    if not program.is_file():
        cannot_run("sev-snp-measure is not installed", "pip install sev-snp-measure")
    words = ["--measurement", b64encode(LD).decode(), "--idkey", "id.pem", "--authorkey", "author.pem"]
    theirs = subprocess.run([str(program), *words], capture_output=True, text=True, check=True).stdout
    ours = printed(capsys, "create", *words)
    assert ours.splitlines()[1:] == theirs.splitlines()[1:]
    (block, auth), (their_block, their_auth) = properties(ours), properties(theirs)
    assert block == their_block
    signatures = {"id_block_sig": bytes(512), "id_key_sig": bytes(512)}
    assert auth.but(**signatures) == their_auth.but(**signatures)
    assert all(each.ok for each in id_block.check(their_block, their_auth, measurement=LD))


def test_json_and_show(capsys: pytest.CaptureFixture[str]) -> None:
    """--json has the same as show."""
    shown = json.loads(printed(capsys, *CREATE, "--json"))
    Path("made").write_text(f"id-block={shown['id_block']},id-auth={shown['id_auth']}\n")
    assert json.loads(printed(capsys, "show", "made", "--json")) == shown
    lines = printed(capsys, "show", "made").splitlines()
    assert lines[0].split() == ["measurement:", LD.hex()]
    assert lines[5].split() == ["policy:", "0x30000"]
    assert lines[-1].split() == ["author_key_digest:", "None"]
    assert not any(line.startswith(("id_block", "id_auth")) for line in lines)


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 0 when a launch would take it, 1 with the check that fails, from a file or standard input."""
    block, auth = made()
    write("good", bytes(block), bytes(auth))
    out = printed(capsys, "check", "good", "--measurement", LD.hex(), "--policy", "0x30000")
    assert [line.split(":")[0] for line in out.splitlines()] == [
        "ok  1 LD",
        "ok  2 POLICY",
        "ok  3 VERSION",
        "ok  3 reserved",
        "ok  4 ID_KEY_ALGO",
        "ok  5 ID_BLOCK_SIG",
        "ok  6 AUTH_KEY_ALGO",
        "ok  6 ID_KEY_SIG",
    ]
    bad = printed(capsys, "check", "good", "--measurement", "00" * 48, code=1)
    assert bad.startswith(f"BAD 1 LD: got {LD.hex()}, wanted {'00' * 48}")
    shown = json.loads(printed(capsys, "check", "good", "--policy", "1", "--json", code=1))
    assert shown["good"] is False
    assert shown["checks"][0] == {
        "check": 2,
        "field": "POLICY",
        "ok": False,
        "text": "got 0x30000, wanted 0x1 (AMD 56860, ID block)",
    }


def test_short_auth(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU takes an id-auth of less than 4096 bytes; what is missing is zero."""
    block = id_block.make(LD)
    auth = id_block.sign(block, ID_KEY)
    write("short", bytes(block), bytes(auth)[:0x644])
    text = Path("short").read_bytes()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    printed(capsys, "check", "-")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "no id-block=, wanted id-block=...,id-auth=..."),
        (f"id-block={'AA' * 64}", "no id-auth="),
        ("id-block=A,id-auth=AAAA", "id-block: got 'A'..., wanted base64"),
        (f"id-block={'A' * 124},id-auth=AAAA", "id-block: got 93 bytes, wanted 96"),
        (f"id-block={'A' * 132},id-auth=AAAA", "id-block: got 99 bytes, wanted 96"),
        (f"id-block={'A' * 128},id-auth={'A' * 5464}", "id-auth: got 4098 bytes, wanted 4096"),
    ],
)
def test_unreadable(capsys: pytest.CaptureFixture[str], text: str, wanted: str) -> None:
    """Anything but the two properties: exit code 3."""
    Path("bad").write_text(text)
    for verb in ("check", "show"):
        assert main(["id-block", verb, "bad"]) == 3
        assert wanted in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--idkey", "none.pem"], 3, "none.pem: cannot be read: No such file"),
        (["--authorkey", "text"], 3, "text: private key: got something else"),
        (["--guest-svn", "0x100000000"], 2, "IdBlock.guest_svn: got 0x100000000"),
        (["--policy", "-1"], 2, "IdBlock.policy: got -0x1"),
    ],
)
def test_create_refuses(capsys: pytest.CaptureFixture[str], words: list[str], code: int, text: str) -> None:
    """Keys that cannot be read, numbers that do not fit: one line."""
    Path("text").write_text("no key")
    assert main(["id-block", *CREATE, *words]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert text in said.err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--measurement", "AAAA"], "got 3 bytes, wanted 48"),
        (["--measurement", "!"], "got '!', wanted a digest in base64 or hex"),
        (["--measurement", "zz" * 48], "wanted a digest in base64 or hex"),
        (["--family-id", "00"], "got 1 bytes, wanted 16"),
        (["--image-id", "x"], "got 'x', wanted 32 hex digits"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    """Options that are no value: argparse's exit code 2."""
    with pytest.raises(SystemExit) as end:
        main(["id-block", *CREATE, *words])
    assert end.value.code == 2
    assert text in capsys.readouterr().err
