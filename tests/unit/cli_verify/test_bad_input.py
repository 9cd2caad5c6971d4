"""Every kind of wrong file to every option of `swsnp verify`: one clear line, the right exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swsnp.certs.x509_reader import to_pem

if TYPE_CHECKING:
    from tests.unit.cli_verify.conftest import Files

OPTIONS: Final = ("report", "certs", "vcek", "vlek", "chain", "crl", "roots", "policy")
CERTIFICATES: Final = {"certs", "vcek", "vlek", "chain", "roots"}
GOOD: Final[dict[str, set[str]]] = {
    "report": {"report", "response", "hcl", "hex", "zeros"},
    "certs": {"leaf", "pem", "root", "table", "torn table"},
    "vcek": {"leaf"},
    "vlek": set(),
    "chain": {"pem", "root"},
    "crl": {"crl", "pem crl"},
    "roots": {"root", "pem"},
    "policy": {"policy", "empty"},
}
"""Option to the kinds of files that it takes; every other is unreadable input."""


def kinds(content: dict[str, bytes]) -> dict[str, bytes]:
    """A file of each kind that a person might pick by mistake."""
    report, table, leaf = content["report.bin"], content["table.bin"], content["vcek.der"]
    return {
        "report": report,
        "response": content["response.bin"],
        "hcl": content["hcl.bin"],
        "hex": content["report.hex"],
        "zeros": bytes(len(report)),
        "short report": report[:-1],
        "two reports": report * 2,
        "leaf": leaf,
        "torn leaf": leaf[:-1],
        "leaf and more": leaf + b"\0",
        "pem": content["root.pem"],
        "torn pem": to_pem(leaf)[:-30],
        "pem of a key": b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        "pem crl": to_pem(content["crl.der"], label="X509 CRL"),
        "root": content["root.der"],
        "table": table,
        "torn table": table[:2000],
        "crl": content["crl.der"],
        "policy": b"minimum_guest_svn = 1\n",
        "wrong policy": b'{"measurements": "none"}',
        "unknown key": b"measurment = 1\n",
        "empty": b"",
        "text": b"see attached\n",
        "noise": bytes(range(256)) * 5,
        "elf": b"\x7fELF" + bytes(4096),
        "large": bytes((1 << 20) + 1),
    }


def arguments_with(files: Files, option: str, name: str) -> list[str]:
    """A command line that is right but for the file of one option."""
    if option == "report":
        return [files(name), *files.certified]
    others = files.certified if option == "policy" else ("--at", files.at.isoformat())
    return [files("report.bin"), f"--{option}", files(name), *others]


def test_every_kind_is_tried_with_every_option(content: dict[str, bytes]) -> None:
    """The table of what is taken names kinds and options that exist."""
    assert set(GOOD) == set(OPTIONS)
    assert set().union(*GOOD.values()) <= kinds(content).keys()


@pytest.mark.parametrize("option", OPTIONS)
def test_wrong_files(files: Files, content: dict[str, bytes], option: str) -> None:
    """Exit code 3 and one line that names the file; what the option takes is judged instead."""
    for kind, data in kinds(content).items():
        name = kind.replace(" ", "_")
        files.write(name, data)
        code, out, err = files.verify(*arguments_with(files, option, name))
        if kind in GOOD[option]:
            assert code in {0, 1}, (option, kind, err)
            assert err == ""
        else:
            assert (code, out) == (3, ""), (option, kind, out)
            assert err.startswith("swsnp verify: "), (option, kind)
            assert err.count("\n") == 1, (option, kind)
            assert name in err, (option, kind)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["nothing", ".", "report.bin/x", "a\0b"])
def test_files_that_cannot_be_read(files: Files, option: str, name: str) -> None:
    """Missing, a directory, below a file, impossible: exit code 3 and one line."""
    code, out, err = files.verify(*arguments_with(files, option, name))
    assert (code, out) == (3, "")
    assert err.count("\n") == 1
    assert "cannot be read" in err


@pytest.mark.parametrize("option", OPTIONS)
def test_errors_in_json(files: Files, option: str) -> None:
    """With --json the error is an object on standard output too."""
    code, found = files.json(*arguments_with(files, option, "nothing"))
    assert (code, found["error"]["kind"]) == (3, "InputError")


def test_wrong_leaf_kind_is_named(files: Files) -> None:
    """A VCEK where a VLEK is wanted is told by name."""
    code, _, err = files.verify(files("report.bin"), "--vlek", files("vcek.der"))
    assert code == 3
    assert "got DER certificate with a VCEK, wanted a VLEK (--vlek)" in err


def test_a_root_that_is_none(files: Files) -> None:
    """A certificate that is not named like a root cannot be chosen as one."""
    code, _, err = files.verify(files("report.bin"), "--roots", files("ask.der"))
    assert code == 3
    assert "wanted ARK-{Milan,Genoa,Turin}" in err


def test_a_table_that_is_torn_is_the_hosts_fault(files: Files, content: dict[str, bytes]) -> None:
    """What the host sent is judged: a table with its mark that cannot be read is a refusal, C0."""
    torn = files.write("torn", content["table.bin"][:2000])
    code, found = files.json(files("report.bin"), "--certs", torn, "--roots", files("root.der"))
    assert code == 1
    assert "C0" in [each["check"] for each in found["findings"] if each["outcome"] == "fail"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(
    number=st.integers(0, 99),
    damage=st.dictionaries(st.integers(0, 9999), st.integers(1, 255), min_size=1, max_size=4),
    option=st.sampled_from(OPTIONS),
)
def test_any_damage(
    files: Files, content: dict[str, bytes], number: int, damage: dict[int, int], option: str
) -> None:
    """A damaged file of any kind to any option: refused or unreadable, never a traceback, never accepted."""
    name = sorted(content)[number % len(content)]
    spoiled = bytearray(content[name])
    for at, change in damage.items():
        spoiled[at % len(spoiled)] ^= change
    files.write("damaged", bytes(spoiled))
    code, _, err = files.verify(*arguments_with(files, option, "damaged"))
    assert code in {1, 3}
    assert err.count("\n") == (1 if code == 3 else 0)
    assert code == 1 or files("damaged") in err
