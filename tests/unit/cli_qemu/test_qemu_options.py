"""QEMU's option grammar: the series' command lines, and every refusal by name."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest

from swsnp.abi.snp_report import Product
from swsnp.cli.qemu_options import parse_qemu_options
from swsnp.cli.qemu_values import comma_list, size
from swsnp.cli.vm_firmware import plan_of
from swsnp.errors import UsageError
from swsnp.vmm.certs import BlobFile

SERIES = (
    "-smp 32,maxcpus=255 -cpu EPYC-Milan-v2 "
    "-machine q35,confidential-guest-support=sev0,memory-backend=ram1 "
    "-object memory-backend-memfd,id=ram1,size=4G,share=true,reserve=false "
    "-object sev-snp-guest,id=sev0,cbitpos=51,reduced-phys-bits=1,id-auth="
)
MINIMAL = "-cpu EPYC-Milan -machine q35,confidential-guest-support=s"


def line(properties: str = "cbitpos=51,reduced-phys-bits=1", more: str = "") -> list[str]:
    return [*MINIMAL.split(), "-object", f"sev-snp-guest,id=s,{properties}", *more.split()]


def b64(size: int) -> str:
    return base64.b64encode(b"x" * size).decode()


def test_command_line_of_the_series() -> None:
    """The cover letter's basic invocation, word for word."""
    options = parse_qemu_options([*SERIES.split(), "-bios", "OVMF_CODE-upstream-20240410-fix1d-AmdSevX64.fd"])
    assert (options.cpus, options.maxcpus, options.cpu_model) == (32, 255, "EPYC-Milan-v2")
    assert (options.product, options.machine, options.memory_size) == (Product.MILAN, "q35", 4 << 30)
    assert options.bios == Path("OVMF_CODE-upstream-20240410-fix1d-AmdSevX64.fd")
    snp = options.snp
    assert (snp.id, snp.cbitpos, snp.reduced_phys_bits, snp.id_auth) == ("sev0", 51, 1, b"")
    assert (snp.certs_path, snp.policy, options.accelerator) == (None, 0x30000, "builtin")
    config = options.vm_config()
    assert (config.vcpus, config.memory_size, config.certs, config.id_block) == (32, 4 << 30, None, None)


def test_command_line_with_certificates() -> None:
    """The cover letter's second invocation: `certs-path=` behind an empty `id-auth=`."""
    options = parse_qemu_options(f"{SERIES},certs-path=/home/mroth/cert.blob".split())
    assert options.snp.certs_path == Path("/home/mroth/cert.blob")
    certs = options.vm_config().certs
    assert isinstance(certs, BlobFile)
    assert (certs.name, certs.timeout_s) == ("/home/mroth/cert.blob", 0.1)


def test_every_property() -> None:
    """QEMU, qom.json, sev-snp-guest: each property arrives where it belongs."""
    options = parse_qemu_options(
        line(
            "cbitpos=51,reduced-phys-bits=5,sev-device=/dev/sev1,kernel-hashes=on,policy=0xb0000,"
            f"guest-visible-workarounds={b64(16)},id-block={b64(96)},id-auth={b64(4096)},"
            f"author-key-enabled=on,vcek-disabled=true,host-data={b64(32)},certs-filename=a,,b,certs-timeout=250",
            "-bios b -kernel k",
        )
    )
    config = options.vm_config()
    assert options.snp.kernel_hashes
    assert (config.sev_device, config.policy, config.reduced_phys_bits) == ("/dev/sev1", 0xB0000, 5)
    assert (config.gosvw, config.host_data) == (b"x" * 16, b"x" * 32)
    assert (config.id_block, config.id_auth) == (b"x" * 96, b"x" * 4096)
    assert (config.author_key_enabled, config.vcek_disabled) == (True, True)
    assert isinstance(config.certs, BlobFile)
    assert (config.certs.path, config.certs.timeout_s) == (Path("a,b"), 0.25)


@pytest.mark.parametrize(
    ("more", "name", "memory", "cpus", "maxcpus"),
    [
        ("", "vm0", 128 << 20, 1, 1),
        ("-m 512 -name guest=a", "a", 512 << 20, 1, 1),
        ("-m size=1G -smp cpus=2", "vm0", 1 << 30, 2, 2),
        ("--m 64M --smp maxcpus=4 -accel builtin", "vm0", 64 << 20, 4, 4),
        ("-m 2048k -name a,,b", "a,b", 2 << 20, 1, 1),
    ],
)
def test_defaults_and_forms(more: str, name: str, memory: int, cpus: int, maxcpus: int) -> None:
    """QEMU: 128 MiB and one vCPU unless given; -m counts MiB; the first key may be left out."""
    options = parse_qemu_options(line(more=more))
    assert (options.name, options.memory_size, options.cpus, options.maxcpus) == (name, memory, cpus, maxcpus)


def test_machine_has_a_short_name() -> None:
    """QEMU: -M is -machine; versioned q35 types are accepted."""
    machine = "pc-q35-10.2,confidential-guest-support=s,smm=off"
    snp = "sev-snp-guest,id=s,cbitpos=51,reduced-phys-bits=1"
    options = parse_qemu_options(["-cpu", "EPYC-Genoa-v1", "-M", machine, "-object", snp])
    assert (options.machine, options.product) == ("pc-q35-10.2", Product.GENOA)


def test_the_host_decides_the_c_bit() -> None:
    """QEMU compares cbitpos with the host's CPUID; here that is a setting."""
    options = parse_qemu_options(line("cbitpos=47,reduced-phys-bits=1"), host_cbitpos=47)
    assert options.vm_config().cbitpos == 47


@pytest.mark.parametrize(
    ("model", "product"),
    [
        ("EPYC-Milan", "Milan"),
        ("EPYC-Genoa-v2", "Genoa"),
        ("EPYC-Turin", "Turin"),
        ("EPYC-Turin-v1", "Turin"),
    ],
)
def test_cpu_models(model: str, product: str) -> None:
    """The CPU model says which chip, and so which key hierarchy, the machine has."""
    options = parse_qemu_options([word.replace("EPYC-Milan", model) for word in line()])
    assert options.product.value == product


GOOD = "cbitpos=51,reduced-phys-bits=1"


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (
            line(f"{GOOD},colour=red"),
            "-object sev-snp-guest,id=s: unknown property 'colour'; known are id, sev-dev",
        ),
        (line(more="-nographics"), "unknown option '-nographics'; known are -smp, -cpu, -machine"),
        (line(more="disk.img"), "unknown option 'disk.img'"),
        (line(more="-machin x"), "unknown option '-machin'"),
        (line(more="-smp"), "-smp: wants a value"),
        (line(more="-smp 2 -smp 3"), "-smp: given twice"),
        (line(more="-smp 4,maxcpus=2"), "-smp: maxcpus 2, wanted at least cpus, 4"),
        (line(more="-smp 0"), "-smp: property 'cpus': got '0', wanted a number 1..4096"),
        (line(more="-smp 2,2"), "-smp: got '2', wanted key=value"),
        (line(more="-smp 2,sockets=1"), "-smp: unknown property 'sockets'; known are cpus, maxcpus"),
        (line(more="-m 1.5G"), "-m: property 'size': got '1.5G', wanted a size such as 512M or 4G"),
        (line(more="-m 0"), "-m: property 'size': got '0', wanted a size of whole 4 KiB pages"),
        (line(more="-accel tcg"), "-accel: got 'tcg', wanted one of builtin, kvm"),
        (line(more="-accel kvm"), "-accel: got 'kvm', wanted builtin, or -kernel without -bios"),
        (
            ["-kernel", "k", "-accel", "builtin"],
            "-accel: got 'builtin', wanted kvm with -kernel and no -bios",
        ),
        (line(more="-initrd i"), "-initrd: only allowed with -kernel"),
        (line(more="-append a"), "-append: only allowed with -kernel"),
        (["-kernel", "k", "-serial", "pty"], "-serial: got 'pty', wanted stdio, mon:stdio or file:NAME"),
        (["-kernel", "k", "-serial", "file:"], "-serial: wanted a file's name behind file:"),
        (
            line(more="-object rng-random,id=r"),
            "-object: unknown type 'rng-random'; known are memory-backend-memfd",
        ),
        (line(more="-object {'a':1}"), "-object: got JSON"),
        (line(more="-object id=r"), "-object: unknown type ''"),
        (
            line(more="-object memory-backend-ram,size=4K"),
            "-object memory-backend-ram: property 'id' is missing",
        ),
        (line(more="-object memory-backend-ram,id=s"), "-object memory-backend-ram,id=s: this id is taken"),
        (line("cbitpos=47,reduced-phys-bits=1"), "property 'cbitpos': got 47, wanted the host's 51"),
        (line("reduced-phys-bits=1"), "property 'cbitpos': got 0, wanted the host's 51"),
        (["xm", "2G"], "unknown option 'xm'"),
        (line("cbitpos=51"), "property 'reduced-phys-bits' is missing, wanted 1..63"),
        (
            line("cbitpos=51,reduced-phys-bits=64"),
            "property 'reduced-phys-bits': got '64', wanted a number 1..63",
        ),
        (line("cbitpos=51,reduced-phys-bits=0"), "got '0', wanted a number 1..63"),
        (line(f"{GOOD},kernel-hashes=maybe"), "property 'kernel-hashes': got 'maybe', wanted on or off"),
        (line(f"{GOOD},kernel-hashes"), "-object: got 'kernel-hashes', wanted key=value"),
        (line(f"{GOOD},cbitpos=51"), "-object: property 'cbitpos' given twice"),
        (line(f"{GOOD},policy=high"), "property 'policy': got 'high', wanted a number"),
        (line(f"{GOOD},policy=0x10000000000000000"), "property 'policy'"),
        (line(f"{GOOD},host-data={b64(31)}"), "wanted base64 of exactly 32 bytes (these are 31)"),
        (line(f"{GOOD},host-data="), "wanted base64 of exactly 32 bytes (these are 0)"),
        (line(f"{GOOD},host-data=%%"), "property 'host-data': got '%%', wanted base64"),
        (line(f"{GOOD},id-block={b64(97)}"), "wanted base64 of exactly 96 bytes (these are 97)"),
        (line(f"{GOOD},id-auth={b64(4097)}"), "wanted base64 of at most 4096 bytes (these are 4097)"),
        (line(f"{GOOD},guest-visible-workarounds={b64(15)}"), "wanted base64 of exactly 16 bytes"),
        (line(f"{GOOD},certs-path="), "property 'certs-path': got '', wanted a value"),
        (line(f"{GOOD},certs-path=a,certs-filename=b"), "are the same property; give one"),
        (line(f"{GOOD},certs-timeout=-1"), "property 'certs-timeout'"),
        (["-cpu", "EPYC-Rome", *line()[2:]], "-cpu: got model 'EPYC-Rome', wanted one of EPYC-Milan[-vN]"),
        (["-cpu", "EPYC-Milanese", *line()[2:]], "-cpu: got model 'EPYC-Milanese'"),
        (["-cpu", "EPYC-Milan,avx=off", *line()[2:]], "-cpu: unknown property 'avx'; known are model"),
        (line()[2:], "-cpu: got model ''"),
        (["-cpu", "EPYC-Milan"], "-machine: got type ''"),
        (["-cpu", "EPYC-Milan", "-machine", "pc"], "-machine: got type 'pc', wanted q35"),
        (["-cpu", "EPYC-Milan", "-machine", "q35"], "'confidential-guest-support' is missing"),
        (["-cpu", "EPYC-Milan", "-machine", "q35,smm=on"], "wanted auto or off: SNP guests have no SMM"),
        (MINIMAL.split(), "no object with id 's'; there are none"),
        (
            [*MINIMAL.split(), "-object", "memory-backend-ram,id=s,size=4K"],
            "object 's' is memory-backend-ram, wanted sev-snp-guest",
        ),
    ],
)
def test_refusals(argv: list[str], text: str) -> None:
    """QEMU refuses, or this machine does not model it: the error names what it is and what is known."""
    with pytest.raises(UsageError, match=re.escape(text)):
        parse_qemu_options(argv)


def test_the_last_number_that_is_taken() -> None:
    """QEMU: the ends of a property's range belong to it."""
    for text in ("1", "63"):
        (found,) = [parse_qemu_options(line(f"cbitpos=51,reduced-phys-bits={text}")).snp]
        assert found.reduced_phys_bits == int(text)


def test_plan_of_a_firmware_launch(tmp_path: Path) -> None:
    """Without -bios nothing is measured beforehand; with it the model's CPUID signature has to be known."""
    assert plan_of(parse_qemu_options(line())) is None
    image = tmp_path / "OVMF.fd"
    image.write_bytes(b"")
    words = ["-cpu", "EPYC-Milan-vx", *line(more=f"-bios {image}")[2:]]
    with pytest.raises(UsageError, match="'EPYC-Milan-vx', wanted one whose CPUID signature is known"):
        plan_of(parse_qemu_options(words))


@pytest.mark.parametrize(
    ("backend", "more", "text"),
    [
        ("x", "", "property 'memory-backend': no object with id 'x'; there are s"),
        ("s", "", "object 's' is sev-snp-guest, wanted memory-backend-"),
        ("r", "-object memory-backend-ram,id=r", "-object r: property 'size' is missing"),
        ("r", "-object memory-backend-ram,id=r,size=4M -m 8M", "-m: got 0x800000, wanted the size of 'r'"),
        ("r", "-object memory-backend-ram,id=r,size=5000", "got '5000', wanted a size of whole 4 KiB pages"),
    ],
)
def test_memory_backend(backend: str, more: str, text: str) -> None:
    """QEMU: -m must agree with the machine's memory backend, which must exist and have a size."""
    argv = line(more=more)
    argv[3] += f",memory-backend={backend}"
    with pytest.raises(UsageError, match=re.escape(text)):
        parse_qemu_options(argv)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {"first": ""}),
        ("a", {"first": "a"}),
        ("a,,b", {"first": "a,b"}),
        ("a,,,b=c", {"first": "a,", "b": "c"}),
        ("k=v=w,x=", {"k": "v=w", "x": ""}),
        ("x=,,y", {"x": ",y"}),
        ("x=,y=z", {"x": "", "y": "z"}),
    ],
)
def test_comma_lists(text: str, expected: dict[str, str]) -> None:
    """qemu(1): `,,` in a value is one comma; an empty value before a single comma stays empty."""
    assert comma_list(text, "first", "-x") == expected


@pytest.mark.parametrize("text", ["a,b", "=v", "a,", "k=v,"])
def test_comma_lists_that_cannot_be(text: str) -> None:
    """An item without a key, or a trailing comma, is refused."""
    with pytest.raises(UsageError, match="-x: got .*, wanted key=value"):
        comma_list(text, "first", "-x")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096b", 4096),
        ("8k", 8192),
        ("8K", 8192),
        ("3M", 3 << 20),
        ("2g", 2 << 30),
        ("1T", 1 << 40),
        ("0x1000", 4096),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    """qemu(1): suffixes B, K, M, G and T, small or large; without one the option's own unit counts."""
    assert size(1)(text) == expected


def test_files_to_load() -> None:
    """-bios, -kernel, -initrd and -append are taken as they are, commas and all."""
    options = parse_qemu_options(
        [*line(), "-bios", "a,b.fd", "-kernel", "k", "-initrd", "i", "-append", "console=ttyS0,115200 x=y"]
    )
    assert (options.bios, options.kernel, options.initrd) == (Path("a,b.fd"), Path("k"), Path("i"))
    assert options.append == "console=ttyS0,115200 x=y"
    options = parse_qemu_options(line())
    assert (options.bios, options.kernel, options.initrd, options.append) == (None, None, None, "")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("-bios b -initrd i", "-initrd: only allowed with -kernel"),
        ("-bios b -append a", "-append: only allowed with -kernel"),
        ("-bios b -bios c", "-bios: given twice"),
        ("-bios", "-bios: wants a value"),
    ],
)
def test_files_that_do_not_go_together(words: str, text: str) -> None:
    """QEMU: an initial RAM disk or a command line needs a kernel."""
    with pytest.raises(UsageError, match=re.escape(text)):
        parse_qemu_options(line(more=words))


def test_kernel_alone() -> None:
    """-kernel without -bios needs no more: machine, CPU and SNP guest are what they can only be."""
    options = parse_qemu_options(["-kernel", "vmlinuz", "-append", "a=b,c d", "-m", "512M", "-no-reboot"])
    assert (options.kernel, options.initrd, options.append) == (Path("vmlinuz"), None, "a=b,c d")
    assert (options.accelerator, options.machine, options.product) == ("kvm", "q35", Product.MILAN)
    assert (options.snp.cbitpos, options.no_reboot, options.serial) == (None, True, "stdio")
    assert options.vm_config().memory_size == 512 << 20


def test_kernel_with_an_object() -> None:
    """The C-bit position of a guest that really runs is judged when the host is known, not here."""
    more = "-kernel vmlinuz -initrd i -serial file:log -nographic"
    options = parse_qemu_options(line("cbitpos=39,certs-path=blob", more))
    assert (options.snp.cbitpos, options.snp.reduced_phys_bits) == (39, 1)
    assert options.snp.certs_path == Path("blob")
    assert (options.initrd, options.serial, options.no_reboot) == (Path("i"), "file:log", False)


@pytest.mark.parametrize("more", ["", "-bios b", "-kernel k"])
def test_kernel_hashes_for_nobody(more: str) -> None:
    """kernel-hashes=on: hashes of a kernel, for a firmware that looks at them; QEMU gives up as well."""
    with pytest.raises(UsageError, match="'kernel-hashes': got on, wanted -bios and -kernel with it"):
        parse_qemu_options(line("cbitpos=51,reduced-phys-bits=1,kernel-hashes=on", more))
