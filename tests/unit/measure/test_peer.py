"""Bit for bit what sev-snp-measure computes, and where we disagree on purpose."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swsnp.abi.ovmf import SectionType
from swsnp.cli.measure import MODES, digest_of, parse
from swsnp.errors import LayoutError, UsageError
from swsnp.measure.firmware_volume import FirmwareVolume
from swsnp.measure.vmsa_pages import CPU_SIGNATURES, Vmm
from swsnp.testing.firmware_image import AMD_SEV, firmware_image

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Skip

SVSM_SECTIONS = [(0x80_1000, 0x1000, SectionType.SNP_SECRETS), (0x80_2000, 0x1000, SectionType.CPUID)]
MIXED = [(0x10_0000, 0x2000, 2), (0x20_0000, 0x1000, 3), (0x30_0000, 0x1000, 3), *AMD_SEV[4:]]


def ours(mode: str, ovmf: Path, **options: Any) -> bytes:
    """Our digest, through the command line's own reading of the options."""
    words = ["--mode", mode, "--ovmf", str(ovmf)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return digest_of(parse(words))


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of every kind, a kernel and a RAM disk."""
    folder = tmp_path_factory.mktemp("images")
    made = {
        "amd-sev": firmware_image(text=b"code" * 3000),
        "mixed": firmware_image(sections=MIXED, size=0x2_0000, fill=b"\0"),
        "plain": firmware_image(sections=AMD_SEV[:4], hash_table=(0, 0), reset_eip=0xFFFF_1234),
        "svsm": firmware_image(sections=SVSM_SECTIONS, size=0x8000, svsm_entry=0x1234, text=b"svsm"),
        "kernel": b"MZ" + bytes(range(256)) * 77,
        "initrd": b"070701" * 1000,
        "empty": b"",
        "bare": firmware_image(sections=None),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in made}


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_matrix(peer: Callable[..., bytes], files: dict[str, Path], data: st.DataObject) -> None:
    """Modes, VMMs, numbers and kinds of vCPUs, features, kernel, RAM disk and command line."""
    draw = data.draw
    mode = draw(st.sampled_from(MODES))
    image = files[draw(st.sampled_from(["amd-sev", "mixed", "plain"]))]
    given: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if mode in ("snp", "seves", "snp:svsm"):
        given["vcpus"] = options["vcpus"] = draw(st.sampled_from([0, 1, 2, 3, 17, 255]))
        name = draw(st.sampled_from(sorted(CPU_SIGNATURES)))
        given["vcpu_sig"], options["vcpu_type"] = CPU_SIGNATURES[name], name
    if mode in ("snp", "seves"):
        vmm = draw(st.sampled_from(Vmm))
        given["vmm"] = options["vmm_type"] = vmm.value
    if mode == "snp":
        features = draw(st.sampled_from([1, 0, 0x21, 0x201, (1 << 64) - 1]))
        given["guest_features"], options["guest_features"] = features, hex(features)
    if mode == "snp:svsm":
        given["svsm_file"] = options["svsm"] = files["svsm"]
        given["ovmf_vars_size"] = options["vars_size"] = draw(st.sampled_from([4096, 0x8_4000]))
    if mode in ("snp", "sev", "seves") and image.name != "plain" and draw(st.booleans()):
        given["kernel"] = options["kernel"] = files[draw(st.sampled_from(["kernel", "empty"]))]
        if draw(st.booleans()):
            given["initrd"] = options["initrd"] = files["initrd"]
        if draw(st.booleans()):
            given["append"] = options["append"] = draw(st.sampled_from(["console=ttyS0", "café ☕", " "]))
    assert ours(mode, image, **options) == peer(mode, image, **given)


@pytest.mark.parametrize("vmm", list(Vmm))
@pytest.mark.parametrize("name", sorted(CPU_SIGNATURES))
def test_every_cpu_model(peer: Callable[..., bytes], files: dict[str, Path], name: str, vmm: Vmm) -> None:
    """Every vCPU type under every VMM."""
    image = files["amd-sev"]
    wanted = peer("snp", image, vcpus=2, vcpu_sig=CPU_SIGNATURES[name], vmm=vmm.value)
    assert ours("snp", image, vcpus=2, vcpu_type=name, vmm_type=vmm.value) == wanted


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, 270), st.integers(0, 255), st.integers(0, 15))
def test_any_signature(
    peer: Callable[..., bytes], files: dict[str, Path], family: int, model: int, stepping: int
) -> None:
    """Family, model and stepping make the signature that the peer makes of them."""
    from sevsnpmeasure.vcpu_types import cpu_sig

    signature = cpu_sig(family, model, stepping)
    image = files["plain"]
    by_parts = ours("snp", image, vcpus=1, vcpu_family=family, vcpu_model=model, vcpu_stepping=stepping)
    assert by_parts == ours("snp", image, vcpus=1, vcpu_sig=hex(signature))
    assert by_parts == peer("snp", image, vcpu_sig=signature)


@pytest.mark.parametrize("vmm", list(Vmm))
@pytest.mark.parametrize("name", ["ovmf_AmdSev_suffix.bin", "ovmf_OvmfX64_suffix.bin"])
def test_genuine_tables(peer: Callable[..., bytes], vectors: Path, name: str, vmm: Vmm) -> None:
    """The tables of two EDK II builds."""
    image = vectors / "measure" / name
    wanted = peer("snp", image, vcpus=3, vcpu_sig=0x800F12, vmm=vmm.value)
    assert ours("snp", image, vcpus=3, vcpu_type="EPYC", vmm_type=vmm.value) == wanted


@pytest.mark.parametrize("mode", ["sev", "seves", "snp", "snp:ovmf-hash"])
@pytest.mark.parametrize("vcpus", [1, 255])
def test_debian_images(peer: Callable[..., bytes], debian_image: Path, mode: str, vcpus: int) -> None:
    """Debian's images with SEV metadata, whole: OVMF.fd and its part OVMF_CODE.fd."""
    for image in (debian_image, Path("/usr/share/OVMF/OVMF_CODE.fd")):
        if image.is_file():
            options = {"vcpus": vcpus, "vcpu_type": "EPYC-Milan"} if mode in ("seves", "snp") else {}
            assert ours(mode, image, **options) == peer(mode, image, vcpus=vcpus, vcpu_sig=0xA00F11)


@pytest.mark.parametrize("mode", ["sev", "seves", "snp", "snp:ovmf-hash"])
@pytest.mark.parametrize("vcpus", [1, 255])
def test_debian_13_image(peer: Callable[..., bytes], debian_13_image: Path, mode: str, vcpus: int) -> None:
    """Debian 13's OVMF.fd, 4 MiB with SEV metadata."""
    options = {"vcpus": vcpus, "vcpu_type": "EPYC-Genoa"} if mode in ("seves", "snp") else {}
    assert ours(mode, debian_13_image, **options) == peer(
        mode, debian_13_image, vcpus=vcpus, vcpu_sig=0xA10F10
    )


def test_every_debian_image(peer: Callable[..., bytes], debian_4m: Path) -> None:
    """Every image of Debian's package: those with SEV metadata as they are, the others when allowed."""
    images = sorted(each for each in debian_4m.parent.glob("*.fd") if "CODE" in each.name)
    assert images
    for image in images:
        words = ["--mode", "snp", "--ovmf", str(image), "--vcpus", "2", "--vcpu-type", "EPYC-Genoa"]
        wanted = peer("snp", image, vcpus=2, vcpu_sig=0xA10F10)
        assert digest_of(parse([*words, "--allow-no-metadata"])) == wanted, image
        if FirmwareVolume(image.read_bytes()).sections is not None:
            assert digest_of(parse(words)) == wanted, image


def test_image_digest_as_seed(peer: Callable[..., bytes], debian_image: Path) -> None:
    """--snp-ovmf-hash with what snp:ovmf-hash printed gives what the image gives."""
    seed = ours("snp:ovmf-hash", debian_image).hex()
    wanted = peer("snp", debian_image, vcpu_sig=0x800F12, snp_ovmf_hash_str=seed)
    assert ours("snp", debian_image, vcpus=1, vcpu_type="EPYC", snp_ovmf_hash=seed) == wanted


def test_options_are_the_peers(cannot_run: Skip) -> None:
    """Every option of sev-snp-measure is one of ours, by name and by number of values."""
    program = Path(sys.executable).with_name("sev-snp-measure")
    if not program.is_file():
        cannot_run("sev-snp-measure is not installed", "pip install sev-snp-measure")
    theirs, own = (
        subprocess.run(words, capture_output=True, text=True, check=True, env={"COLUMNS": "999"}).stdout
        for words in ([str(program), "--help"], [sys.executable, "-m", "swsnp", "measure", "--help"])
    )

    def options(text: str) -> dict[str, bool]:
        lines = [line.strip().split("  ")[0] for line in text.splitlines() if line.startswith("  -")]
        return {line.split(", ")[-1].split(" ")[0]: " " in line.split(", ")[-1] for line in lines}

    assert len(options(theirs)) > 20
    missing = {name: value for name, value in options(theirs).items() if options(own).get(name) != value}
    assert missing == {"--version": False}  # `swsnp --version` says it


# --- where we disagree --------------------------------------------------------------------------------------


def test_disagreement_no_metadata(
    peer: Callable[..., bytes], debian_4m: Path, files: dict[str, Path]
) -> None:
    """The peer measures an image that no SNP guest can attest from; we do when told to, with its digest."""
    for image in (debian_4m, files["bare"]):
        wanted = peer("snp", image, vcpus=2, vcpu_sig=0x800F12)
        with pytest.raises(LayoutError, match="no SEV metadata"):
            ours("snp", image, vcpus=2, vcpu_type="EPYC")
        words = ["--mode", "snp", "--ovmf", str(image), "--vcpus", "2", "--vcpu-type", "EPYC"]
        assert digest_of(parse([*words, "--allow-no-metadata"])) == wanted


def test_disagreement_signature_zero(peer: Callable[..., bytes], files: dict[str, Path]) -> None:
    """The peer's program takes --vcpu-sig 0 for none and ends; its library measures it, and so do we."""
    words = ["--mode", "snp", "--ovmf", str(files["amd-sev"]), "--vcpus", "1", "--vcpu-sig", "0"]
    program = Path(sys.executable).with_name("sev-snp-measure")
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "missing --vcpu-type or --vcpu-sig" in done.stderr
    assert digest_of(parse(words)) == peer("snp", files["amd-sev"], vcpu_sig=0)


@pytest.mark.parametrize(
    ("options", "same_as"),
    [
        ({"vcpu_sig": -1}, {"vcpu_sig": 0xFFFF_FFFF_FFFF_FFFF}),
        ({"guest_features": 1 << 64 | 1}, {"guest_features": 1}),
        ({"vcpus": -1}, {"vcpus": 0}),
    ],
)
def test_disagreement_numbers_that_do_not_fit(
    peer: Callable[..., bytes], files: dict[str, Path], options: dict[str, int], same_as: dict[str, int]
) -> None:
    """The peer cuts numbers, and takes -1 vCPUs for none; we refuse them."""
    image = files["amd-sev"]
    assert peer("snp", image, **options) == peer("snp", image, **same_as)
    ours_too = {"vcpus": 1, "vcpu_sig": 1, **options}
    with pytest.raises(UsageError, match="wanted"):
        ours("snp", image, **ours_too)


def test_disagreement_kernel_with_an_svsm(
    peer: Callable[..., bytes], files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Both leave the kernel out of an SVSM's launch; we say so."""
    options = {"vcpus": 1, "vcpu_type": "EPYC", "svsm": files["svsm"], "vars_size": 4096}
    with_kernel = ours("snp:svsm", files["amd-sev"], **options, kernel=files["kernel"])
    given = {"svsm_file": files["svsm"], "ovmf_vars_size": 4096, "vcpu_sig": 0x800F12}
    assert with_kernel == peer("snp:svsm", files["amd-sev"], **given, kernel=files["kernel"])
    assert "--kernel is not looked at in mode snp:svsm" in capsys.readouterr().err


def test_disagreement_fpu_of_an_svsm(files: dict[str, Path], peer: Callable[..., bytes]) -> None:
    """The peer leaves X87_FCW at 0 with an SVSM; --vmsa-field measures a VMM that sets it."""
    options = {"vcpus": 1, "vcpu_type": "EPYC", "svsm": files["svsm"], "vars_size": 4096}
    given = {"svsm_file": files["svsm"], "ovmf_vars_size": 4096, "vcpu_sig": 0x800F12}
    wanted = peer("snp:svsm", files["amd-sev"], **given)
    assert ours("snp:svsm", files["amd-sev"], **options) == wanted
    assert ours("snp:svsm", files["amd-sev"], **options, vmsa_field="x87_fcw=0x37f") != wanted


def test_hash_of_nothing(files: dict[str, Path]) -> None:
    """An empty kernel is a kernel."""
    assert hashlib.sha256(files["empty"].read_bytes()).hexdigest().startswith("e3b0c442")
