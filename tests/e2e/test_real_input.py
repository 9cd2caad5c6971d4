"""C programs built against the kernel's own header attest under `swsnp run`; openssl judges the result."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from swsnp.abi.snp_report import SIGNED_SIZE, AttestationReport, Product
from swsnp.certs import table
from swsnp.errors import HostError
from swsnp.front import wrap

if TYPE_CHECKING:
    from collections.abc import Callable

    from swsnp.machine import Machine

SOURCE = Path(__file__).parent / "programs" / "attest.c"
NO_CALL = (1 << 64) - 1


@pytest.fixture(scope="module", params=["dynamic", "static"])
def program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, cannot_run: Callable[..., None]
) -> Path:
    """The client, linked both ways: interception must not depend on a dynamic linker."""
    if shutil.which("gcc") is None or not Path("/usr/include/linux/sev-guest.h").is_file():
        cannot_run("no compiler or no kernel headers", "install gcc, libc6-dev and linux-libc-dev")
    try:
        wrap.require_usable()
    except HostError as error:
        cannot_run(str(error), "a kernel with seccomp user notification", avoidable=False)
    built = tmp_path_factory.mktemp(request.param) / "attest"
    options = ["-static"] if request.param == "static" else []
    subprocess.run(["gcc", "-Wall", "-Werror", *options, "-o", str(built), str(SOURCE)], check=True)
    return built


def run(
    *arguments: str | Path, profile: str = "linux-7.2", options: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """`swsnp run` in a process of its own."""
    command = [sys.executable, "-m", "swsnp", "run", "--seed", "e2e", "--profile", profile, *options, "--"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def blob(seeded_machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The certificate blob of the machine that seed "e2e" makes."""
    path = tmp_path_factory.mktemp("blob") / "certs.blob"
    path.write_bytes(seeded_machine.certificate_table())
    return path


@pytest.mark.parametrize("profile", ["coco-v1", "coco-v1-revised", "linux-7.2"])
def test_extended_report_and_openssl(program: Path, blob: Path, tmp_path: Path, profile: str) -> None:
    """The size first (EIO, exitinfo2 1<<32), then the whole table; openssl accepts chain and signature."""
    report_file, certs_file = tmp_path / "report.bin", tmp_path / "certs.bin"
    done = run(
        program, "extended", report_file, certs_file, profile=profile, options=("--certs-path", str(blob))
    )
    assert (done.returncode, done.stderr) == (0, "")
    pages = -(-blob.stat().st_size // 4096)
    assert done.stdout == f"size {pages * 4096}\n"
    certs = certs_file.read_bytes()
    assert certs == blob.read_bytes().ljust(pages * 4096, b"\0")
    report = report_file.read_bytes()
    parsed = AttestationReport.parse(report)
    assert parsed.report_data == b"E" * 64
    assert parsed.chip_id.startswith(b"SWSN")
    openssl_accepts(report, certs, tmp_path)


def openssl_accepts(report: bytes, certs: bytes, folder: Path) -> None:
    """Chain by `openssl verify`, signature by `openssl dgst`; neither knows anything of us."""
    if shutil.which("openssl") is None:
        pytest.fail("openssl is missing: install openssl")
    names = ("vcek", "ask", "ark")
    for name, entry in zip(names, table.parse(certs), strict=True):
        der = folder / f"{name}.der"
        der.write_bytes(entry.data)
        subprocess.run(
            ["openssl", "x509", "-inform", "DER", "-in", der, "-out", folder / f"{name}.pem"], check=True
        )
    ark, ask, vcek = (str(folder / f"{name}.pem") for name in ("ark", "ask", "vcek"))
    chain = ["-CAfile", ark, "-untrusted", ask, vcek]
    at = ["-attime", "1770000000"]
    verified = subprocess.run(["openssl", "verify", *at, *chain], capture_output=True, text=True, check=False)
    assert verified.returncode == 0, verified.stderr
    parsed = AttestationReport.parse(report)
    r, s = (int.from_bytes(value, "little") for value in (parsed.signature_r, parsed.signature_s))
    (folder / "signed.bin").write_bytes(report[:SIGNED_SIZE])
    config = folder / "signature.cnf"
    config.write_text(f"asn1=SEQUENCE:sig\n[sig]\nr=INTEGER:0x{r:x}\ns=INTEGER:0x{s:x}\n")
    signature = folder / "signature.der"
    subprocess.run(["openssl", "asn1parse", "-genconf", config, "-noout", "-out", signature], check=True)
    key = folder / "key.pem"
    with key.open("w") as file:
        subprocess.run(
            ["openssl", "x509", "-in", folder / "vcek.pem", "-noout", "-pubkey"], check=True, stdout=file
        )
    judged = subprocess.run(
        ["openssl", "dgst", "-sha384", "-verify", key, "-signature", signature, folder / "signed.bin"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.stdout == "Verified OK\n", judged.stderr


def test_plain_report_and_derived_key(program: Path, tmp_path: Path) -> None:
    """SNP_GET_REPORT and SNP_GET_DERIVED_KEY; a seeded machine repeats both in another process."""
    first, again = tmp_path / "first", tmp_path / "again"
    for name in (first, again):
        assert run(program, "report", name).returncode == 0
    assert first.read_bytes() == again.read_bytes()
    assert AttestationReport.parse(first.read_bytes()).report_data == b"R" * 64
    for name in (first, again):
        assert run(program, "key", name).returncode == 0
    assert first.read_bytes() == again.read_bytes() != bytes(32)


def test_host_without_certificates(program: Path, tmp_path: Path) -> None:
    """No certificates, or a KVM that cannot ask: the first call succeeds and certs_len stays 0."""
    for profile, options in (("linux-7.2", ("--no-certs",)), ("linux-6.12", ())):
        done = run(program, "extended", tmp_path / "r", tmp_path / "c", profile=profile, options=options)
        assert (done.returncode, done.stdout) == (0, "size 0\n")


def test_refusals(program: Path) -> None:
    """Linux driver, order of checks: every misuse gets its errno and exitinfo2; the key survives misuse."""
    done = run(program, "refusals")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    seen = {row[0]: tuple(row[1:]) for row in rows}
    unset, none = "0xff", "0"

    def failed(number: int, exitinfo2: str) -> tuple[str, str, str]:
        return ("-1", str(number), exitinfo2)

    assert seen == {
        "argument_unreadable": failed(errno.EFAULT, none),
        "unknown_ioctl_unreadable": failed(errno.EFAULT, none),
        "msg_version_0": failed(errno.EINVAL, none),
        "unknown_ioctl": failed(errno.ENOTTY, unset),
        "no_request": failed(errno.EINVAL, unset),
        "no_response": failed(errno.EINVAL, unset),
        "request_unreadable": failed(errno.EFAULT, unset),
        "response_unwritable": failed(errno.EFAULT, none),
        "certs_len_unaligned": failed(errno.EINVAL, unset),
        "certs_len_too_large": failed(errno.EINVAL, unset),
        "reserved_bytes": ("0", "0", none),
        "reserved_bytes_status": ("0x16",),
        "still_works": ("0", "0", none),
        "msg_version_2": failed(errno.EIO, "0x16"),
        "key_is_wiped": failed(errno.ENOTTY, none),
    }


@pytest.mark.parametrize("product", list(Product))
def test_every_product(program: Path, tmp_path: Path, product: Product) -> None:
    """--product chooses chip id form and report version."""
    out = tmp_path / "report.bin"
    assert run(program, "report", out, options=("--product", product.value.lower())).returncode == 0
    report = AttestationReport.parse(out.read_bytes())
    assert report.version == {Product.MILAN: 3, Product.GENOA: 2, Product.TURIN: 5}[product]
    assert any(report.chip_id[8:]) is (product is not Product.TURIN)
