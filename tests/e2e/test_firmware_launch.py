"""A firmware launched through KVM: its report carries what `swsnp measure` computes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_report import AttestationReport, GuestPolicy
from swsnp.cli import main
from swsnp.crypto.ecdsa import SigningKey
from swsnp.errors import UsageError
from swsnp.machine import Machine
from swsnp.measure import id_block
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.launch_plan import LaunchConfig, launch_digest
from swsnp.testing.firmware_image import firmware_image
from swsnp.vmm.config import VmConfig

if TYPE_CHECKING:
    from tests.conftest import Skip

ROOT = Path(__file__).resolve().parents[2]
OVMF = "OVMF_CODE-upstream-20240410-apic-mmio-fix1d-AmdSevX64.fd"
DEBIAN = Path("/usr/share/ovmf/OVMF.fd")
SERIES = (
    "-smp 32,maxcpus=255 -cpu EPYC-Milan-v2 "
    "-machine q35,confidential-guest-support=sev0,memory-backend=ram1 "
    "-object memory-backend-memfd,id=ram1,size=4G,share=true,reserve=false "
    "-object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,id-auth="
)
ID_KEY, AUTHOR = SigningKey.from_scalar(0x1234), SigningKey.from_scalar(0x5678)


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("OVMF.fd", OVMF):
        Path(name).write_bytes(firmware_image(text=b"code" * 5000))
    Path("vmlinuz").write_bytes(b"kernel")
    Path("initrd").write_bytes(b"initrd")
    Path("cert.blob").write_bytes(b"random data")


def line(properties: str = "", more: str = "", smp: int = 1, model: str = "EPYC-Milan-v2") -> list[str]:
    """A command line of `swsnp vm`."""
    return (
        f"-smp {smp} -cpu {model} -machine q35,confidential-guest-support=s "
        f"-object sev-snp-guest,id=s,cbitpos=51,reduced-phys-bits=1{properties} -bios OVMF.fd {more}"
    ).split()


def launched(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> tuple[dict[str, Any], AttestationReport]:
    """JSON of `swsnp vm`, and its first report."""
    assert main(["vm", "--json", *words]) == 0
    shown = json.loads(capsys.readouterr().out)
    return shown, AttestationReport.parse(bytes.fromhex(shown["reports"][0]["report"]))


def measured(capsys: pytest.CaptureFixture[str], words: str, *more: str) -> str:
    assert main(["measure", "--mode", "snp", "--ovmf", "OVMF.fd", *words.split(), *more]) == 0
    return capsys.readouterr().out.strip()


@pytest.mark.parametrize("smp", [1, 2, 32, 255])
def test_measurement_is_the_computed_one(capsys: pytest.CaptureFixture[str], smp: int) -> None:
    """One VMSA page per vCPU, the boot processor's and the others'."""
    shown, report = launched(capsys, line(smp=smp))
    wanted = measured(capsys, f"--vcpus {smp} --vcpu-type EPYC-Milan-v2")
    assert report.measurement.hex() == wanted
    assert shown["vcpus"] == smp
    assert shown["firmware"] == {
        "bios": "OVMF.fd",
        "status": "measured, not executed",
        "executed": False,
        "kernel": "none",
        "measurement": wanted,
    }


@pytest.mark.parametrize("model", ["EPYC-Milan", "EPYC-Genoa-v1", "EPYC-Turin"])
def test_cpu_models(capsys: pytest.CaptureFixture[str], model: str) -> None:
    """The CPU model's signature is in every VMSA page, on the chip of its product line."""
    _, report = launched(capsys, line(model=model, smp=2))
    assert report.measurement.hex() == measured(capsys, f"--vcpus 2 --vcpu-type {model}")


def test_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """`--profile`: a measurement does not depend on the kernel's age."""
    wanted = measured(capsys, "--vcpus 2 --vcpu-type EPYC-Milan")
    for profile in ("coco-v1", "coco-v1-revised", "linux-6.12", "linux-7.2"):
        _, report = launched(capsys, ["--profile", profile, *line(smp=2)])
        assert report.measurement.hex() == wanted


def test_kernel_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    """-kernel, -initrd and -append with kernel-hashes=on."""
    more = "-kernel vmlinuz -initrd initrd -append"
    shown, report = launched(capsys, [*line(",kernel-hashes=on", more), "console=ttyS0 quiet"])
    options = "--vcpus 1 --vcpu-type EPYC-Milan --kernel vmlinuz --initrd initrd --append"
    assert report.measurement.hex() == measured(capsys, options, "console=ttyS0 quiet")
    assert shown["firmware"]["kernel"] == "measured, not executed"


def test_kernel_without_hashes(capsys: pytest.CaptureFixture[str]) -> None:
    """kernel-hashes=off, the default: nothing measures the kernel, and the output says so."""
    shown, report = launched(capsys, line(more="-kernel vmlinuz"))
    assert report.measurement.hex() == measured(capsys, "--vcpus 1 --vcpu-type EPYC-Milan")
    assert shown["firmware"]["kernel"] == "neither measured nor executed"


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    """The console says what became of firmware and kernel."""
    assert main(["vm", *line(more="-kernel vmlinuz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = measured(capsys, "--vcpus 1 --vcpu-type EPYC-Milan")
    assert lines[2:5] == [
        "firmware OVMF.fd: measured, not executed; the built-in guest runs instead",
        "kernel: neither measured nor executed",
        f"measurement: {wanted}",
    ]


# --- what else the owner decides ----------------------------------------------------------------------------


def signed(capsys: pytest.CaptureFixture[str], *, author: bool = False, **given: Any) -> tuple[str, Any]:
    """Properties of an ID block for the guest of `line`, and its authentication."""
    wanted = bytes.fromhex(measured(capsys, "--vcpus 1 --vcpu-type EPYC-Milan"))
    block = id_block.make(given.pop("measurement", wanted), **given)
    auth = id_block.sign(block, ID_KEY, AUTHOR if author else None)
    texts = (b64encode(bytes(each)).decode() for each in (block, auth))
    return ",id-block={},id-auth={}".format(*texts), auth


def test_id_block(capsys: pytest.CaptureFixture[str]) -> None:
    """id-block=, id-auth=: the report carries the block's fields and the key's digest."""
    given: dict[str, Any] = {"family_id": b"f" * 16, "image_id": b"i" * 16, "guest_svn": 7}
    properties, auth = signed(capsys, **given)
    _, report = launched(capsys, line(properties))
    assert (report.family_id, report.image_id, report.guest_svn) == tuple(given.values())
    assert report.id_key_digest == id_block.id_key_digest(auth)
    assert not any(report.author_key_digest)


def test_author_key(capsys: pytest.CaptureFixture[str]) -> None:
    """author-key-enabled=on: the author's digest too."""
    properties, auth = signed(capsys, author=True)
    _, report = launched(capsys, line(f"{properties},author-key-enabled=on"))
    assert report.signer_info.author_key_en == 1
    assert report.author_key_digest == id_block.author_key_digest(auth)


@pytest.mark.parametrize(
    ("given", "status"),
    [
        ({"measurement": bytes(48)}, "BAD_MEASUREMENT"),
        ({"policy": 0xB0000}, "POLICY_FAILURE"),
    ],
)
def test_id_block_of_another_guest(
    capsys: pytest.CaptureFixture[str], given: dict[str, Any], status: str
) -> None:
    """AMD 56860, SNP_LAUNCH_FINISH: another measurement or policy does not start."""
    properties, _ = signed(capsys, **given)
    assert main(["vm", *line(properties)]) == 4
    assert status in capsys.readouterr().err


def test_id_block_that_is_not_signed(capsys: pytest.CaptureFixture[str]) -> None:
    """AMD 56860, SNP_LAUNCH_FINISH: BAD_SIGNATURE."""
    properties, _ = signed(capsys)
    block = properties.split(",id-auth=")[0]
    auth = b64encode(bytes(id_block.sign(id_block.make(bytes(48)), ID_KEY))).decode()
    assert main(["vm", *line(f"{block},id-auth={auth}")]) == 4
    assert "BAD_SIGNATURE" in capsys.readouterr().err


def test_host_data_and_policy(capsys: pytest.CaptureFixture[str]) -> None:
    """host-data= and policy= are the report's, and do not change the measurement."""
    data = bytes(range(32))
    properties = f",host-data={b64encode(data).decode()},policy=0xb0000"
    _, report = launched(capsys, line(properties))
    assert (report.host_data, report.policy) == (data, GuestPolicy(0xB0000))
    assert report.measurement.hex() == measured(capsys, "--vcpus 1 --vcpu-type EPYC-Milan")


def test_vcek_disabled(capsys: pytest.CaptureFixture[str]) -> None:
    """vcek-disabled=on: no VLEK is loaded either, so the guest gets a status and no report."""
    assert main(["vm", *line(",vcek-disabled=on")]) == 1
    assert "measurement: not told, since there is no report" in capsys.readouterr().out


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "words", "code", "text"),
    [
        (firmware_image(sections=None), line(), 3, "no SEV metadata, wanted an image built for SEV-SNP"),
        (b"\0" + firmware_image(), line(), 3, "wanted whole pages"),
        (firmware_image()[:-1], line(), 3, "firmware table footer: got GUID"),
        (firmware_image(sections=[(0x80_0000, 4096, 1)]), line(), 2, "no SECRETS section"),
        (
            firmware_image(sections=[(0xA000_0000, 4096, 2)]),
            line(),
            2,
            "section 0 (SNP_SECRETS): got 0xa0000000..0xa0001000, wanted it inside RAM",
        ),
        (firmware_image(), line(",kernel-hashes=on"), 2, "'kernel-hashes': got on, wanted -bios and -kernel"),
        (
            firmware_image(hash_table=(0, 0)),
            line(",kernel-hashes=on", "-kernel vmlinuz"),
            2,
            "this firmware has no hash table area",
        ),
        (firmware_image(), line(",kernel-hashes=on", "-kernel none"), 3, "none: cannot be read"),
        (firmware_image(), line(model="EPYC-Milan-vx"), 2, "wanted one whose CPUID signature is known"),
    ],
)
def test_refusals(
    capsys: pytest.CaptureFixture[str], image: bytes, words: list[str], code: int, text: str
) -> None:
    """What cannot be launched: one line and its exit code."""
    Path("OVMF.fd").write_bytes(image)
    assert main(["vm", *words]) == code
    assert text in capsys.readouterr().err


def test_firmware_beside_the_stand_in() -> None:
    """The built-in guest keeps out of the firmware's pages, wherever they are; its CPUID page is optional."""
    sections = [(0x10_0000, 0x8000, 1), (0x30_0000, 0x1000, 2), (0x31_0000, 0x10_0000, 1)]
    plan = LaunchConfig(FirmwareVolume(firmware_image(sections=sections)), vcpus=3, signature=1)
    with Machine().create_vm(config=VmConfig(vcpus=3), plan=plan) as vm:
        vm.boot()
        assert (vm.layout.secrets_page, vm.layout.cpuid_page) == (0x30_0000, 0)
        used = (*vm.layout.shared_pages(), *vm.layout.ghcb_pages)
        assert not any(gpa <= page < gpa + size for page in used for gpa, size, _ in sections)
        report = AttestationReport.parse(vm.report(bytes(64)).report)
    assert report.measurement == launch_digest(plan)


def test_no_room_for_the_stand_in() -> None:
    """A guest needs memory beside its firmware."""
    sections = [(0x10_0000, 0x1000, 2), (0x11_0000, 0xF0_0000, 1)]
    plan = LaunchConfig(FirmwareVolume(firmware_image(sections=sections)), vcpus=1, signature=1)
    with pytest.raises(UsageError, match="memory size: got 0x1010000, wanted at least"):
        Machine().create_vm(config=VmConfig(vcpus=1, memory_size=0x101_0000), plan=plan)


def test_a_move_keeps_the_measurement() -> None:
    """A guest launched from a firmware goes on elsewhere, with its pages where they were."""
    plan = LaunchConfig(FirmwareVolume(firmware_image()), vcpus=2, signature=1)
    with Machine().create_vm(config=VmConfig(vcpus=2), plan=plan) as vm:
        vm.boot()
        saved = vm.save()
    with Machine().restore_vm(saved) as vm:
        assert vm.layout.secrets_page == 0x80_D000
        report = AttestationReport.parse(vm.report(bytes(64)).report)
    assert report.measurement == launch_digest(plan)


# --- the series' command lines, word for word ---------------------------------------------------------------


def test_first_line_of_the_series(capsys: pytest.CaptureFixture[str]) -> None:
    """The basic invocation; the firmware lies in the working directory under the name that it says."""
    shown, report = launched(capsys, [*SERIES.split(), "-bios", OVMF])
    assert report.measurement.hex() == measured(capsys, "--vcpus 32 --vcpu-type EPYC-Milan-v2")
    assert shown["firmware"]["bios"] == OVMF


def test_second_line_of_the_series(cannot_run: Skip) -> None:
    """With certificate data: /home/mroth/cert.blob is put there in a mount namespace of the test's own."""
    unshare = shutil.which("unshare")
    script = (
        "mount -t tmpfs none /home && mkdir /home/mroth && cp cert.blob /home/mroth/ && "
        f"exec {sys.executable} -m swsnp vm --json {SERIES},certs-path=/home/mroth/cert.blob -bios {OVMF}"
    )
    if unshare is None or subprocess.run([unshare, "-rm", "true"], check=False).returncode:
        cannot_run("no mount namespaces here", "allow user namespaces", avoidable=False)
    if any(each.startswith("/home/") for each in (sys.executable, str(ROOT), *sys.path)):
        cannot_run("Python or swsnp lie below /home", "a checkout elsewhere", avoidable=False)
    done = subprocess.run([unshare, "-rm", "sh", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["certs_sha256"] is not None
    assert shown["exit_reason"] == 43
    assert shown["firmware"]["status"] == "measured, not executed"


def test_the_lines_are_the_documents() -> None:
    """docs/series.md shows the second line as it is run here."""
    text = re.sub(r" \\\n\s+", " ", (ROOT / "docs" / "series.md").read_text())
    assert f"{SERIES},certs-path=/home/mroth/cert.blob -bios {OVMF}\n" in text


def test_debian_image(capsys: pytest.CaptureFixture[str], cannot_run: Skip) -> None:
    """A real firmware, whole."""
    if not DEBIAN.is_file():
        cannot_run(f"no {DEBIAN}", "apt-get install ovmf")
    if FirmwareVolume(DEBIAN.read_bytes()).sections is None:
        cannot_run(f"{DEBIAN} has no SEV metadata", "Debian 12's ovmf", avoidable=False)
    Path("OVMF.fd").write_bytes(DEBIAN.read_bytes())
    _, report = launched(capsys, line(smp=4))
    assert report.measurement.hex() == measured(capsys, "--vcpus 4 --vcpu-type EPYC-Milan")
