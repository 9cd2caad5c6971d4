"""`swsnp measure`: its options, what it prints, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from base64 import b64decode
from pathlib import Path

import pytest

from swsnp.cli import main
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.kernel_hashes import KernelHashes
from swsnp.measure.launch_plan import LaunchConfig, image_digest, launch_digest
from swsnp.measure.legacy import sev_digest
from swsnp.measure.vmsa_pages import RESET_EIP, Vmm, reset_page
from swsnp.testing.firmware_image import AP_RESET_EIP, firmware_image

IMAGE = firmware_image()
FIRMWARE = FirmwareVolume(IMAGE)
SVSM_SECTIONS = [(0x80_1000, 0x1000, 2)]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = {
        "OVMF.fd": IMAGE,
        "bare.fd": firmware_image(sections=None),
        "odd.fd": IMAGE + b"\0",
        "svsm.bin": firmware_image(size=0x8000, sections=SVSM_SECTIONS, svsm_entry=0x10),
        "vars.fd": bytes(0x4000),
        "kernel": b"kernel",
        "initrd": b"initrd",
    }
    for name, data in files.items():
        Path(name).write_bytes(data)


def options(text: str = "", mode: str = "snp", vcpu: str = "--vcpus 2 --vcpu-type EPYC") -> list[str]:
    return f"--mode {mode} --ovmf OVMF.fd {vcpu} {text}".split()


def printed(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 0) -> str:
    assert main(["measure", *words]) == code
    return capsys.readouterr().out.strip()


def refused(capsys: pytest.CaptureFixture[str], words: list[str], code: int = 2) -> str:
    assert main(["measure", *words]) == code
    said = capsys.readouterr()
    assert said.out == ""
    return said.err.strip()


def digest(**given: object) -> bytes:
    wanted = {"vcpus": 2, "signature": 0x800F12, **given}
    return launch_digest(LaunchConfig(FIRMWARE, **wanted))  # type: ignore[arg-type]


def test_digest(capsys: pytest.CaptureFixture[str]) -> None:
    """One line of hex, as sev-snp-measure."""
    assert printed(capsys, options()) == digest().hex()


def test_base64(capsys: pytest.CaptureFixture[str]) -> None:
    """--output-format base64."""
    assert b64decode(printed(capsys, options("--output-format base64"))) == digest()


@pytest.mark.parametrize(
    ("mode", "name"), [("snp", "SEV_SNP"), ("sev", "SEV"), ("seves", "SEV_ES"), ("snp:svsm", "SEV_SNP_SVSM")]
)
def test_verbose(capsys: pytest.CaptureFixture[str], mode: str, name: str) -> None:
    """-v says what the digest is, in the peer's words."""
    more = "--svsm svsm.bin --vars-size 4096" if mode == "snp:svsm" else ""
    plain = printed(capsys, options(more, mode))
    assert printed(capsys, options(f"-v {more}", mode)) == f"Calculated {name} guest measurement: {plain}"


def test_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """Kernel, RAM disk and command line count by their hashes."""
    kernel, initrd = (hashlib.sha256(each).digest() for each in (b"kernel", b"initrd"))
    words = options("--kernel kernel --initrd initrd --append")
    wanted = digest(hashes=KernelHashes(kernel, initrd, b"a b"))
    assert printed(capsys, [*words, "a b"]) == wanted.hex()
    assert printed(capsys, options("--kernel kernel")) == digest(hashes=KernelHashes(kernel)).hex()
    assert printed(capsys, [*options(), "--kernel", ""]) == digest().hex()


def test_kernel_by_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    """A shell's process substitution is a pipe, whose size is not known."""
    for name, option, data in (("pipe", "--kernel", b"kernel"), ("image", "--ovmf", IMAGE)):
        os.mkfifo(name)
        writer = threading.Thread(target=Path(name).write_bytes, args=(data,))
        writer.start()
        found = printed(capsys, [*options("--kernel kernel"), option, name])
        writer.join()
        assert found == digest(hashes=KernelHashes(hashlib.sha256(b"kernel").digest())).hex()


@pytest.mark.parametrize(
    ("vcpu", "signature"),
    [
        ("--vcpu-sig 0xa00f11", 0xA00F11),
        ("--vcpu-sig 0", 0),
        ("--vcpu-family 25 --vcpu-model 1 --vcpu-stepping 1", 0xA00F11),
        ("--vcpu-family 0 --vcpu-model 0 --vcpu-stepping 0", 0),
        ("--vcpu-type EPYC-Genoa", 0xA10F10),
        ("--vcpu-type EPYC --vcpu-sig 1", 1),
        ("--vcpu-sig 1 --vcpu-family 25 --vcpu-model 1 --vcpu-stepping 1 --vcpu-type EPYC", 0xA00F11),
    ],
)
def test_which_vcpu(capsys: pytest.CaptureFixture[str], vcpu: str, signature: int) -> None:
    """Type, signature, or family with model and stepping; the peer's precedence."""
    assert printed(capsys, options(vcpu=f"--vcpus 2 {vcpu}")) == digest(signature=signature).hex()


@pytest.mark.parametrize("vmm", [Vmm.EC2, Vmm.GCE])
def test_other_vmm(capsys: pytest.CaptureFixture[str], vmm: Vmm) -> None:
    """EC2 and GCE set the signature themselves: no vCPU type is wanted."""
    words = options(f"--vmm-type {vmm.value}", vcpu="--vcpus 2")
    assert printed(capsys, words) == digest(vmm=vmm).hex()


@pytest.mark.parametrize(("text", "features"), [("0x21", 0x21), ("21", 21), ("0", 0)])
def test_features(capsys: pytest.CaptureFixture[str], text: str, features: int) -> None:
    """Guest features: hexadecimal with 0x, otherwise decimal, as the peer reads them."""
    assert printed(capsys, options(f"--guest-features {text}")) == digest(features=features).hex()


def test_registers(capsys: pytest.CaptureFixture[str]) -> None:
    """--vmsa-field, as often as wanted."""
    words = options("--vmsa-field mxcsr=0 --vmsa-field x87_fcw=0x0")
    assert printed(capsys, words) == digest(vmsa_fields={"mxcsr": 0, "x87_fcw": 0}).hex()


def test_image_digest_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    """Mode snp:ovmf-hash prints what --snp-ovmf-hash takes."""
    seed = printed(capsys, ["--mode", "snp:ovmf-hash", "--ovmf", "OVMF.fd"])
    assert seed == image_digest(FIRMWARE).hex()
    assert printed(capsys, ["-v", "--mode", "snp:ovmf-hash", "--ovmf", "OVMF.fd"]) == seed
    assert printed(capsys, options(f"--snp-ovmf-hash {seed}")) == digest().hex()


def test_sev(capsys: pytest.CaptureFixture[str]) -> None:
    """Mode sev wants no vCPUs, and takes images of any size."""
    assert printed(capsys, ["--mode", "sev", "--ovmf", "OVMF.fd"]) == sev_digest(FIRMWARE).hex()
    wanted = hashlib.sha256(IMAGE + b"\0").hexdigest()
    assert printed(capsys, ["--mode", "sev", "--ovmf", "odd.fd"]) == wanted


def test_svsm_by_file_or_size(capsys: pytest.CaptureFixture[str]) -> None:
    """The variable store counts by its size."""
    by_size = printed(capsys, options("--svsm svsm.bin --vars-size 16384", "snp:svsm"))
    assert printed(capsys, options("--svsm svsm.bin --vars-file vars.fd", "snp:svsm")) == by_size


def test_dump(capsys: pytest.CaptureFixture[str]) -> None:
    """--dump-vmsa writes each page whole; the digest is printed all the same."""
    assert printed(capsys, options("--dump-vmsa")) == digest().hex()
    found = sorted(each.name for each in Path().glob("vmsa*"))
    assert found == ["vmsa0.bin", "vmsa1.bin"]
    for name, eip in zip(found, (RESET_EIP, AP_RESET_EIP), strict=True):
        page = reset_page(Vmm.QEMU, eip=eip, features=1, signature=0x800F12)
        assert Path(name).read_bytes() == page
    printed(capsys, options("--dump-vmsa --explain", vcpu="--vcpus 3 --vcpu-type EPYC"))
    assert Path("vmsa2.bin").read_bytes() == Path("vmsa1.bin").read_bytes()


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    """--json: the digest, and what was given for nothing."""
    shown = json.loads(printed(capsys, options("--json --svsm x")))
    assert shown == {"mode": "snp", "measurement": digest().hex(), "ignored": ["--svsm"]}


def test_explain(capsys: pytest.CaptureFixture[str]) -> None:
    """--explain: type, GPA, number and digest of every run; the last line is the measurement."""
    lines = printed(capsys, options("--explain")).splitlines()
    assert lines[-1] == digest().hex()
    assert lines[-2].split() == ["0xfffffffff000", "1", "VMSA", "vCPU", "1", digest().hex()]
    assert lines[4].startswith("      0x80a000      3 ZERO        section 1 (SNP_SEC_MEM)")
    shown = json.loads(printed(capsys, options("--explain --json")))
    assert shown["measurement"] == digest().hex()
    assert shown["pages"] == 16 + 9 + 3 + 1 + 1 + 1 + 1 + 15 + 2
    run = shown["runs"][2]
    assert {**run, "digest": ""} == {
        "gpa": 0x80_0000,
        "pages": 9,
        "type": "ZERO",
        "what": "section 0 (SNP_SEC_MEM)",
        "contents": "00" * 48,
        "digest": "",
    }


def test_diff(capsys: pytest.CaptureFixture[str]) -> None:
    """`diff`: exit code 1, both digests, the first page that differs, and why."""
    words = ["diff", *options(), "--", "--vcpu-type", "EPYC-Milan"]
    lines = printed(capsys, words, code=1).splitlines()
    assert lines == [
        f"first:  {digest().hex()}",
        f"second: {digest(signature=0xA00F11).hex()}",
        "page 47 differs: vCPU 0, VMSA, gpa 0xfffffffff000",
        "  VMSA field rdx: 0x800f12, 0xa00f11",
    ]
    shown = json.loads(printed(capsys, [*words, "--json"], code=1))
    assert shown["measurements"] == [digest().hex(), digest(signature=0xA00F11).hex()]
    assert shown["difference"]["page"] == 47
    assert shown["difference"]["reasons"] == ["VMSA field rdx: 0x800f12, 0xa00f11"]
    assert shown["difference"]["first"]["gpa"] == 0xFFFF_FFFF_F000
    assert shown["difference"]["first"]["contents"] != shown["difference"]["second"]["contents"]


def test_diff_of_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    """A guest that has no such page."""
    words = ["diff", *options("--json"), "--", "--vcpus", "1"]
    shown = json.loads(printed(capsys, words, code=1))["difference"]
    assert (shown["second"], shown["first"]["what"]) == (None, "vCPU 1")
    lines = printed(capsys, ["diff", *options(), "--", "--vcpus", "3"], code=1).splitlines()
    assert lines[2:] == [
        "page 49 differs: vCPU 2, VMSA, gpa 0xfffffffff000",
        "  only the second goes on, with vCPU 2",
    ]


def test_diff_of_equals(capsys: pytest.CaptureFixture[str]) -> None:
    """Two guests that are measured alike: exit code 0."""
    words = ["diff", *options(), "--", "--vcpu-sig", "0x800f12"]
    assert printed(capsys, words).splitlines()[2] == "measured alike"
    assert json.loads(printed(capsys, [*words, "--json"]))["difference"] is None


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (options(vcpu="--vcpu-type EPYC"), "--vcpus is missing in mode snp"),
        (options(vcpu="--vcpus 1"), "one of --vcpu-type, --vcpu-sig, --vcpu-family is missing in mode snp"),
        (
            options(vcpu="--vcpus 1", mode="seves"),
            "one of --vcpu-type, --vcpu-sig, --vcpu-family is missing",
        ),
        (options("--vcpu-family 25"), "wanted --vcpu-model and --vcpu-stepping with it"),
        (options("--vcpu-family 25 --vcpu-model 1"), "wanted --vcpu-model and --vcpu-stepping with it"),
        (options("--vcpu-model 1"), "--vcpu-family is missing"),
        (options("--vcpu-stepping 1"), "--vcpu-family is missing"),
        (options("--vcpu-sig 0x100000000"), "--vcpu-sig: got 0x100000000, wanted 4 bytes"),
        (options("--vcpu-sig=-1"), "--vcpu-sig: got -0x1, wanted 4 bytes"),
        (options("--vmm-type EC2"), "--vmm-type: got 'EC2', wanted one of QEMU, ec2, gce"),
        (options("--append x"), "--kernel is missing: it is required with --append"),
        (options("--initrd initrd"), "--kernel is missing: it is required with --initrd"),
        (options("--vmsa-field x87_fcw"), "--vmsa-field: got 'x87_fcw', wanted NAME=VALUE"),
        (options("--vmsa-field rip=x"), "--vmsa-field: got 'rip=x', wanted NAME=VALUE"),
        (options("--vmsa-field no=1"), "VMSA field: got 'no'"),
        (options("--snp-ovmf-hash 00"), "--snp-ovmf-hash: got '00', wanted 96 hex digits"),
        (options("--snp-ovmf-hash xyz"), "--snp-ovmf-hash: got 'xyz', wanted 96 hex digits"),
        (options("", "snp:svsm"), "--svsm is missing in mode snp:svsm"),
        (options("--svsm svsm.bin", "snp:svsm"), "one of --vars-size, --vars-file is missing"),
        (
            options(f"--svsm svsm.bin --vars-size 4096 --snp-ovmf-hash {'00' * 48}", "snp:svsm"),
            "--snp-ovmf-hash: got mode snp:svsm, wanted snp",
        ),
        (options("--svsm svsm.bin --vars-size 0", "snp:svsm"), "variable store: got 0"),
        (options("--dump-vmsa", "sev"), "--dump-vmsa: got mode sev, wanted one of seves, snp, snp:svsm"),
        (options("--explain", "seves"), "--explain: got mode seves, wanted snp or snp:svsm"),
        (options(f"--explain --snp-ovmf-hash {'00' * 48}"), "--explain: got --snp-ovmf-hash"),
        (["diff", *options()], "diff: wanted one guest's options, --, and what the second has otherwise"),
        (["diff", *options("", "sev"), "--"], "diff: got mode sev, wanted whole guests"),
        (["diff", *options(), "--", "--snp-ovmf-hash", "00" * 48], "diff: got mode snp, wanted whole"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    """What cannot be meant: exit code 2, one line, nothing on standard output."""
    said = refused(capsys, words).splitlines()[-1]
    assert said.startswith("swsnp measure: ")
    assert text in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (options("--ovmf none.fd"), "none.fd: cannot be read: No such file or directory"),
        (options("--ovmf ."), ".: cannot be read: Is a directory"),
        (options("--kernel none"), "none: cannot be read: No such file or directory"),
        (options("--ovmf odd.fd"), "firmware image: got 65537 bytes, wanted whole pages"),
        (options("--ovmf bare.fd"), "firmware image: no SEV metadata"),
        (options("--ovmf kernel"), "firmware image: got 6 bytes, wanted whole pages"),
        (options("--svsm svsm.bin --vars-file none", "snp:svsm"), "none: cannot be read"),
    ],
)
def test_unreadable(capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    """Input that cannot be used: exit code 3."""
    assert text in refused(capsys, words, code=3)


def test_endless_input(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without an end is read up to the limit."""
    monkeypatch.setattr("swsnp.cli.measure._IMAGE_MAX", 1 << 16)
    assert "/dev/zero: got more than 65536 bytes, wanted an image" in refused(
        capsys, options("--ovmf /dev/zero"), code=3
    )
    printed(capsys, options())
    Path("large.fd").write_bytes(firmware_image(size=0x1_1000))
    assert "large.fd: got more than 65536 bytes" in refused(capsys, options("--ovmf large.fd"), code=3)


def test_no_metadata_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    """--allow-no-metadata: the image alone and its vCPUs."""
    assert len(printed(capsys, options("--ovmf bare.fd --allow-no-metadata"))) == 96


@pytest.mark.parametrize(
    ("mode", "more", "names"),
    [
        ("snp", "--vars-size 1", ["--vars-size"]),
        ("sev", "--guest-features 1", ["--vcpus", "--vcpu-type", "--guest-features"]),
        ("seves", "--guest-features 1", ["--guest-features"]),
        ("snp:ovmf-hash", "--kernel kernel", ["--vcpus", "--vcpu-type", "--kernel"]),
        (
            "snp:svsm",
            "--svsm svsm.bin --vars-size 4096 --kernel kernel --append x",
            ["--kernel", "--append"],
        ),
    ],
)
def test_ignored(capsys: pytest.CaptureFixture[str], mode: str, more: str, names: list[str]) -> None:
    """What a mode does not look at is told on standard error, and the digest is printed."""
    assert main(["measure", *options(more, mode)]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said == [f"swsnp measure: {each} is not looked at in mode {mode}" for each in names]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """--help explains modes, diff and exit codes."""
    for words in (["--help"], ["diff", "--help"]):
        with pytest.raises(SystemExit) as end:
            main(["measure", *words])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert "swsnp measure diff" in shown
        assert "exit codes: 0 good" in shown


def test_nothing_slow_is_loaded() -> None:
    """Speed: the plain command loads neither typing, dataclasses, records nor cryptography."""
    names = "typing dataclasses inspect pathlib tempfile datetime cryptography uuid locale"
    slow = set(names.split())
    code = (
        "import sys; from swsnp.cli import main; "
        f"assert main(['measure', *{options('--kernel kernel')!r}]) == 0; "
        f"print(sorted(({slow} | {{'swsnp.abi.record'}}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:] = {sys.path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
