"""`swsnp certs fetch`, `swsnp kds mirror` and `swsnp kds serve`."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import urllib3

from swsnp.abi.ghcb import CertTableGuid
from swsnp.abi.snp_report import AttestationReport, GuestPolicy, Product, SignerInfo, TcbVersion
from swsnp.amd_ca.kds_double import KdsDouble, Misbehaviour, Trouble
from swsnp.amd_ca.kds_server import KdsServer
from swsnp.certs.chip_words import read_hwid, read_tcb
from swsnp.certs.kds_url import ChainRequest, CrlRequest, VcekRequest, url_of
from swsnp.certs.table import parse
from swsnp.certs.x509_reader import EcKey, read, read_all, to_pem
from swsnp.cli import main
from swsnp.cli.kds import serve
from swsnp.errors import InputError, UsageError
from swsnp.machine import Machine

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MILAN = Product.MILAN
QUICK = "kds 0"
"""A seed whose RSA keys are found quickly."""


@pytest.fixture(scope="session")
def today() -> Machine:
    """A machine whose certificates are of today, as the commands' clock is."""
    return Machine()


@pytest.fixture
def live(today: Machine) -> Iterator[KdsServer]:
    with KdsServer(KdsDouble([today])) as server:
        yield server


@pytest.fixture
def report(today: Machine) -> AttestationReport:
    return AttestationReport(
        version=3,
        policy=GuestPolicy(0x30000),
        cpuid_fam_id=0x19,
        cpuid_mod_id=1,
        chip_id=today.chip.chip_id,
        reported_tcb=today.chip.reported_tcb,
    )


class Command:
    """Runs the command line in a folder of its own, with `live` for a key service."""

    def __init__(self, folder: Path, url: str, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.url = url
        self._capture = capture

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as error:  # argparse
            code = int(error.code or 0)
        out, err = self._capture.readouterr()
        return code, out, err

    def fetch(self, *arguments: str) -> tuple[int, str, str]:
        fixed = ("--kds", self.url, "--cache", str(self.folder / "cache"), "--budget", "0")
        return self("certs", "fetch", *fixed, *arguments)

    def mirror(self, text: str, *arguments: str) -> tuple[int, str, str]:
        fleet = self.folder / "fleet"
        fleet.write_text(text)
        fixed = ("--kds", self.url, "--out", str(self.folder / "mirror"), "--budget", "0")
        return self("kds", "mirror", str(fleet), *fixed, *arguments)


@pytest.fixture
def command(tmp_path: Path, live: KdsServer, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(tmp_path, live.url, capsys)


@pytest.fixture
def report_file(tmp_path: Path, report: AttestationReport) -> str:
    file = tmp_path / "report.bin"
    file.write_bytes(bytes(report))
    return str(file)


# certs fetch


def test_fetch_writes_a_table(command: Command, today: Machine, report_file: str) -> None:
    """VCEK, ASK and ARK in AMD's order; with --crl the list; the same bytes from the cache when offline."""
    blob = command.folder / "certs.blob"
    code, out, err = command.fetch("--report", report_file, "--out", str(blob), "--crl")
    assert (code, err) == (0, "")
    assert out == f"{blob}: {blob.stat().st_size} bytes\n"
    entries = parse(blob.read_bytes())
    assert [each.guid for each in entries] == [
        CertTableGuid.VCEK,
        CertTableGuid.ASK,
        CertTableGuid.ARK,
        CertTableGuid.CRL,
    ]
    assert read(entries[0].data).spki == read(today.vcek_certificate()).spki
    again = command.folder / "again.blob"
    assert command.fetch("--report", report_file, "--out", str(again), "--crl", "--offline")[0] == 0
    assert again.read_bytes() == blob.read_bytes()


def test_fetch_writes_files(command: Command, today: Machine) -> None:
    """By product, chip id and levels; under the names of other tools; --json tells sizes and URLs."""
    tcb = today.chip.reported_tcb
    levels = "bl={boot_loader},tee={tee},snp={snp},ucode={microcode}".format(**tcb.decode(MILAN))
    folder = command.folder / "new" / "certs"
    named = ("--product", "milan", "--chip-id", today.hwid.hex(), "--tcb", levels)
    code, out, _ = command.fetch(*named, "--out-dir", str(folder), "--json")
    assert code == 0
    shown = json.loads(out)
    assert sorted(each.name for each in folder.iterdir()) == [
        "ark.der",
        "ask.der",
        "cert_chain.pem",
        "vcek.der",
    ]
    assert shown["files"] == {str(each): each.stat().st_size for each in folder.iterdir()}
    assert shown["urls"][0] == url_of(VcekRequest(product=MILAN, hwid=today.hwid, tcb=tcb), command.url)
    assert (folder / "cert_chain.pem").read_bytes() == today.hierarchy.chain_pem()
    assert (folder / "ark.der").read_bytes() == today.root_certificate


def test_fetch_of_a_vlek(command: Command, today: Machine, report: AttestationReport) -> None:
    """The leaf is given, ASVK and ARK are fetched; beside the report it has to fit."""
    file, evidence = command.folder / "vlek.pem", command.folder / "r.bin"
    vlek = today.vlek("CN=cc.example").certificate
    file.write_bytes(to_pem(vlek))
    evidence.write_bytes(bytes(replace(report, signer_info=SignerInfo.of(signing_key=1))))
    blob = command.folder / "blob"
    given = ("--vlek", str(file), "--report", str(evidence))
    assert command.fetch(*given, "--out", str(blob))[0] == 0
    entries = parse(blob.read_bytes())
    assert [each.guid for each in entries] == [CertTableGuid.VLEK, CertTableGuid.ASK, CertTableGuid.ARK]
    assert (entries[0].data, entries[1].data) == (vlek, today.hierarchy.asvk)
    assert (
        command.fetch("--vlek", str(file), "--out-dir", str(command.folder / "d"), "--product", "milan")[0]
        == 0
    )
    assert (command.folder / "d" / "asvk.der").read_bytes() == today.hierarchy.asvk


def test_fetch_of_a_strangers_vlek(command: Command, today: Machine) -> None:
    """A VLEK's issuer says whose chain it is: one that says nothing known has none to be fetched."""
    file = command.folder / "vlek.der"
    file.write_bytes(today.vlek("CN=cc.example").certificate.replace(b"SEV-VLEK-Milan", b"SEV-VLEK-Malin"))
    code, _, err = command.fetch("--vlek", str(file), "--urls")
    assert code == 3
    assert "'SEV-VLEK-Malin', wanted SEV-VLEK by SEV-VLEK-PRODUCT" in err


def test_fetch_prints_urls_and_asks_nobody(command: Command, live: KdsServer, report_file: str) -> None:
    """For whoever has a network where this machine has none."""
    code, out, _ = command.fetch("--report", report_file, "--urls", "--crl")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(f"{live.url}/vcek/v1/Milan/")
    assert lines[1:] == [
        url_of(ChainRequest(product=MILAN), live.url),
        url_of(CrlRequest(product=MILAN), live.url),
    ]
    assert json.loads(command.fetch("--report", report_file, "--urls", "--json")[1])["urls"] == lines[:2]
    assert live.double.asked == ()


CHIP = ("--product", "milan", "--chip-id", "00" * 64, "--tcb", "bl=1,tee=0,snp=1,ucode=1")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (CHIP, 2, "one of the arguments --out --out-dir --urls is required"),
        (("--urls",), 2, "wanted --report, or --product with --chip-id and --tcb, or --vlek"),
        (("--urls", "--product", "milan"), 2, "wanted --report, or --product"),
        (("--urls", "--product", "milan", "--chip-id", "00" * 64), 2, "wanted --report, or --product"),
        (("--urls", "--product", "milan", "--tcb", "bl=1"), 2, "wanted --report, or --product"),
        (("--urls", *CHIP[2:]), 2, "wanted --report, or --product"),
        (("--urls", "--report", "@", "--tcb", "bl=1"), 2, "leave out --chip-id and --tcb"),
        (("--urls", "--report", "@", "--chip-id", "00" * 64), 2, "--report names chip and TCB"),
        (("--urls", "--vlek", "@", "--chip-id", "00" * 64), 2, "--vlek stands for itself"),
        (("--urls", "--report", "@", "--product", "turin"), 2, "got Turin, the report is from a Milan"),
        (("--urls", "--vlek", "@", "--tcb", "bl=1"), 2, "leave out --chip-id and --tcb"),
        (("--urls", "--vlek", "@"), 3, "certificate"),
        (("--urls", "--report", "nowhere"), 3, "nowhere: cannot be read"),
        ((*CHIP, "--urls", "--kds", "ftp://x"), 2, "KDS address: got 'ftp://x'"),
        ((*CHIP, "--urls", "--budget", "-1"), 2, "KDS client: got budget -1.0 s"),
        ((*CHIP, "--urls", "--tls-ca", "nowhere"), 3, "nowhere: cannot be read"),
        ((*CHIP, "--out", "@/x"), 1, "404: the key service does not know this chip"),
        ((*CHIP, "--out", "@/x", "--offline"), 4, "not in the cache"),
        ((*CHIP, "--out", "@/x", "--kds", "http://127.0.0.1:1"), 4, "no connection"),
    ],
)
def test_fetch_refuses(
    command: Command, report_file: str, arguments: tuple[str, ...], code: int, told: str
) -> None:
    """Usage 2, unreadable 3, not found 1, not possible 4; one line that says why, and no file."""
    words = [each.replace("@", report_file) if each == "@" else each for each in arguments]
    words = [str(command.folder / "out") if each == "@/x" else each for each in words]
    got, out, err = command.fetch(*words)
    assert (got, out) == (code, "")
    assert told in err
    assert "Traceback" not in err
    assert not (command.folder / "out").exists()


def test_fetch_of_the_wrong_kind(command: Command, today: Machine, report: AttestationReport) -> None:
    """A VLEK's report without its leaf, a VCEK for a VLEK, another TCB or product than the leaf's."""
    vlek, vcek, by_vlek, by_vcek = (
        str(command.folder / each) for each in ("vlek", "vcek", "by-vlek", "by-vcek")
    )
    signed = replace(report, signer_info=SignerInfo.of(signing_key=1))
    for name, data in (
        (vlek, today.vlek("CN=cc.example").certificate),
        (vcek, today.vcek_certificate()),
        (by_vlek, bytes(replace(signed, reported_tcb=TcbVersion(1)))),
        (by_vcek, bytes(report)),
    ):
        with open(name, "wb") as file:  # noqa: PTH123  # names are text here
            file.write(data)
    for arguments, code, told in (
        (("--report", by_vlek), 3, "SIGNING_KEY is 1, wanted 0 (VCEK)"),
        (("--report", by_vcek, "--vlek", vlek), 3, "SIGNING_KEY is 0, wanted 1 (VLEK)"),
        (("--report", by_vlek, "--vlek", vlek), 3, "wanted the report's 0x0000000000000001"),
        (("--vlek", vcek), 3, "got 'SEV-VCEK' by 'SEV-Milan', wanted SEV-VLEK"),
        (("--vlek", vlek, "--product", "genoa"), 2, "--product: got genoa"),
    ):
        got, _, err = command.fetch(*arguments, "--urls")
        assert (got, told in err) == (code, True), err


def test_fetch_into_what_is_no_folder(command: Command, report_file: str) -> None:
    """--out-dir below a file."""
    code, _, err = command.fetch("--report", report_file, "--out-dir", f"{report_file}/x")
    assert code == 2
    assert "cannot be made: Not a directory" in err


def test_verify_from_a_mirror(command: Command, today: Machine, live: KdsServer) -> None:
    """What a mirror fetched completes a report without a network: authentic under the machine's own root."""
    with today.create_vm(certs=None) as vm:
        vm.boot()
        (command.folder / "report.bin").write_bytes(vm.report(bytes(64)).report)
    assert command.mirror("report.bin\n")[0] == 0
    live.close()
    (command.folder / "root.der").write_bytes(today.root_certificate)
    words = ["verify", str(command.folder / "report.bin"), "--roots", str(command.folder / "root.der")]
    words += ["--kds", live.url, "--offline", "--authentic-only"]
    assert command(*words, "--cache", str(command.folder / "mirror"))[0] == 0
    code, _, err = command(*words, "--cache", str(command.folder / "empty"))
    assert (code, "not in the cache" in err) == (4, True)
    code, _, err = command("verify", str(command.folder / "report.bin"), "--cache", "x")
    assert (code, "--cache goes with --kds" in err) == (2, True)


# kds mirror


def test_mirror_fetches_everything_once(
    command: Command, live: KdsServer, report_file: str, today: Machine
) -> None:
    """Reports, chips and URLs in one list; each answer once; the folder then serves offline."""
    tcb = today.chip.reported_tcb
    url = url_of(VcekRequest(product=MILAN, hwid=today.hwid, tcb=tcb))
    older = "bl=3,teeSPL=0,SNP=24,microcode=219"
    fleet = f"# our hosts\n\n{report_file}\nreport.bin\n {url}\nmilan {today.hwid.hex()} {older}\n"
    code, out, err = command.mirror(fleet)
    assert (code, err) == (0, "")
    assert out == f"{command.folder / 'mirror'}: 4 fetched, 0 were there, 0 failed\n"
    assert len(live.double.asked) == 4
    code, out, _ = command.mirror(fleet, "--json")
    assert json.loads(out) == {"complete": True, "kept": 4, "fetched": 0, "failed": [], "not_tried": []}
    assert len(live.double.asked) == 4
    offline = (
        "--cache",
        str(command.folder / "mirror"),
        "--offline",
        "--crl",
        "--out",
        str(command.folder / "b"),
    )
    assert command.fetch("--report", report_file, *offline)[0] == 0


def test_mirror_goes_on_where_it_stopped(command: Command, live: KdsServer, report_file: str) -> None:
    """What is there is not asked for again after a run that failed in the middle."""
    live.double.misbehave(Misbehaviour(trouble=Trouble.THROTTLED, only="/crl", times=1, retry_after="9"))
    code, out, err = command.mirror("report.bin\n")
    assert code == 4
    assert "2 fetched, 0 were there, 1 failed" in out
    assert "/vcek/v1/Milan/crl: 429: asked too often, come back in 9 s" in err
    code, out, _ = command.mirror("report.bin\n")
    assert (code, "1 fetched, 2 were there, 0 failed" in out) == (0, True)
    assert [each.status for each in live.double.asked] == [200, 429, 200, 200]


def test_mirror_tells_what_the_service_does_not_have(command: Command, report_file: str) -> None:
    """An unknown chip does not end the run; exit code 1, and its URL by name."""
    code, out, err = command.mirror(f"milan {'00' * 64} bl=1,tee=0,snp=1,ucode=1\nreport.bin\n", "--json")
    assert code == 1
    shown = json.loads(out)
    assert (shown["complete"], shown["fetched"], shown["not_tried"]) == (False, 3, [])
    assert [each["kind"] for each in shown["failed"]] == ["KdsNotFound"]
    assert shown["failed"][0]["url"] in err


def test_mirror_gives_up_on_a_service_that_is_away(command: Command, live: KdsServer, today: Machine) -> None:
    """Three in a row, each after its budget; the rest is counted, not tried."""
    live.double.misbehave(Misbehaviour(trouble=Trouble.OUTAGE))
    fleet = "".join(f"milan {today.hwid.hex()} bl={n},tee=0,snp=1,ucode=1\n" for n in range(4))
    code, out, _ = command.mirror(fleet)
    assert code == 4
    assert "0 fetched, 0 were there, 3 failed\n" in out
    assert "3 not tried; the same command goes on there" in out
    assert len(live.double.asked) == 3


def test_mirror_reads_the_list_first(command: Command, live: KdsServer) -> None:
    """Lines that mean nothing are named, ten of them, before anything is asked."""
    lines = [
        "nowhere",
        "milan 00 bl=1",
        f"milan {'00' * 64} bl=1",
        "https://x/vcek/v1/Milan/crl",
        "ftp://x/y",
    ]
    code, _, err = command.mirror("\n".join(lines + ["nowhere"] * 9))
    assert code == 3
    for number, told in enumerate(
        (
            "cannot be read",
            "chip id: got 1 bytes, wanted 64",
            "TCB: got 'bl=1', wanted each of bl, tee, snp, ucode",
        ),
        1,
    ):
        assert re.search(rf"fleet:{number}: .*{told}", err), err
    assert "wanted a VCEK's URL" in err
    assert "… and 4 more" in err
    assert live.double.asked == ()


@pytest.mark.parametrize(
    ("text", "told"), [("", "no line names a chip"), ("# nothing\n", "no line names a chip")]
)
def test_mirror_of_nothing(command: Command, text: str, told: str) -> None:
    """An empty list is a mistake."""
    code, _, err = command.mirror(text)
    assert (code, told in err) == (3, True)


def test_mirror_of_no_text(command: Command) -> None:
    """A report in place of the list."""
    (command.folder / "binary").write_bytes(b"\xff\xfe")
    code, _, err = command(
        "kds", "mirror", str(command.folder / "binary"), "--out", str(command.folder / "m")
    )
    assert (code, "wanted text in UTF-8" in err) == (3, True)


def test_mirror_of_vleks(command: Command, report: AttestationReport, live: KdsServer) -> None:
    """Of a report that a VLEK signed, chain and list can be had; version 2 is told its product."""
    signed = replace(report, signer_info=SignerInfo.of(signing_key=1), version=2)
    (command.folder / "v.bin").write_bytes(bytes(signed))
    code, _, err = command.mirror("v.bin\n")
    assert (code, "version 2 names no known product line" in err) == (3, True)
    assert command.mirror("v.bin\n", "--product", "milan")[0] == 0
    assert [each.target for each in live.double.asked] == ["/vlek/v1/Milan/cert_chain", "/vlek/v1/Milan/crl"]


def test_mirror_where_nothing_can_be_written(command: Command, report_file: str) -> None:
    """The folder's name is a file's: said once, not for every chip."""
    code, _, err = command.mirror("report.bin\n", "--out", report_file)
    assert code == 4
    assert err.count("cannot be") == 1


def test_no_sub_verb(command: Command) -> None:
    """As for the verbs themselves."""
    assert command("kds")[0] == 2
    assert command("kds", "--help")[0] == 0
    code, _, err = command("kds", "help me")
    assert (code, "no verb 'help me'; known: serve, mirror" in err) == (2, True)


# words


def test_chips_as_people_write_them() -> None:
    """Levels by the report's names, the service's, or short; Turin's id in 8 bytes or as CHIP_ID."""
    tcb = TcbVersion.encode(Product.TURIN, fmc=1, boot_loader=2, tee=3, snp=4, microcode=5)
    assert read_tcb("bl=0,tee=0,snp=0,ucode=255", MILAN) == 255 << 56
    for text in ("fmc=1,bl=2,tee=3,snp=4,ucode=5", "ucodeSPL=5, snp=4,teeSPL=3,boot_loader=2,FMC=1"):
        assert read_tcb(text, Product.TURIN) == tcb
    assert read_hwid("00" * 7 + "01", Product.TURIN) == bytes(7) + b"\1"
    assert read_hwid("00" * 7 + "01" + "00" * 56, Product.TURIN) == bytes(7) + b"\1"


@pytest.mark.parametrize(
    ("text", "product"),
    [
        ("", MILAN), ("bl=1,tee=0,snp=1", MILAN), ("bl=1,tee=0,snp=1,ucode=1,ucode=1", MILAN),
        ("fmc=1,bl=1,tee=0,snp=1,ucode=1", MILAN), ("bl=1,tee=0,snp=1,ucode=256", MILAN),
        ("bl=1,tee=0,snp=1,ucode=-1", MILAN), ("bl=1,tee=0,snp=1,ucode=", MILAN),
        ("bl=1,tee=0,snp=1,ucode=²", MILAN), ("bl=1,tee=0,snp=1,ucode=\u0661", MILAN),
        ("bl=1,tee=0,snp=1,x=1", MILAN),
        ("bl=1,tee=0,snp=1,ucode=1", Product.TURIN),
    ],
)  # fmt: skip
def test_levels_that_are_none(text: str, product: Product) -> None:
    """Every level of the product, once, 0 to 255."""
    with pytest.raises(UsageError, match="^TCB"):
        read_tcb(text, product)


@pytest.mark.parametrize("text", ["", "00", "0x" + "00" * 64, "00" * 63, "00" * 65, "zz"])
def test_ids_that_are_none(text: str) -> None:
    """64 bytes in hexadecimal."""
    with pytest.raises(UsageError, match="^chip id"):
        read_hwid(text, MILAN)


@pytest.mark.parametrize("text", ["00" * 9, "00" * 8 + "01" + "00" * 55, "00" * 7])
def test_ids_that_are_no_turins(text: str) -> None:
    """8 bytes, or 64 with zeros after the eighth."""
    with pytest.raises(UsageError, match="^chip id"):
        read_hwid(text, Product.TURIN)


# kds serve


def start(*arguments: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "swsnp", "kds", "serve", *arguments]
    served = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert served.stdout is not None
    line = served.stdout.readline()
    if "--json" in arguments:
        ready = json.loads(line)
        assert [each["product"] for each in ready["chips"]] == ["Milan"]
        assert re.fullmatch("5357534e[0-9a-f]{120}", ready["chips"][0]["hwid"])
        return served, ready["url"]
    assert line.startswith("ready http"), served.communicate()
    return served, line.split()[1]


def stop(served: subprocess.Popen[str], number: int = signal.SIGTERM) -> None:
    served.send_signal(number)
    out, err = served.communicate(timeout=60)
    assert (served.returncode, out, err) == (0, "", "")


@pytest.mark.slow
def test_serve_certifies_machines_of_its_seeds(tmp_path: Path) -> None:
    """Ready when it listens; the chips are those of the seeds; roots on demand; SIGTERM ends it well."""
    roots = tmp_path / "roots.pem"
    served, url = start("--seed", QUICK, "--seed", "second", "--save-roots", str(roots))
    try:
        machine = Machine(seed=QUICK.encode())
        for each in (machine, Machine(seed=b"second", same_root_as=machine)):
            request = VcekRequest(product=MILAN, hwid=each.hwid, tcb=each.chip.reported_tcb)
            key = read(urllib3.request("GET", url_of(request, url)).data).key
            assert isinstance(key, EcKey)
            assert (key.x, key.y) == each.chip.vcek_public_point(request.tcb)
        chain = read_all(urllib3.request("GET", f"{url}/vcek/v1/Milan/cert_chain").data)
        assert read_all(roots.read_bytes()) == chain[1:]
        assert urllib3.request("GET", f"{url}/swsnp/asked").status == 400
    finally:
        stop(served)


@pytest.mark.slow
def test_serve_misbehaves_on_demand() -> None:
    """From the start, and at runtime where --control is given; told in JSON; SIGINT ends it well."""
    served, url = start("--json", "--misbehave", "throttled:times=1,retry_after=7,only=/crl", "--control")
    try:
        first = urllib3.request("GET", f"{url}/vcek/v1/Milan/crl", retries=False)
        assert (first.status, first.headers["Retry-After"]) == (429, "7")
        assert urllib3.request("GET", f"{url}/vcek/v1/Milan/crl").status == 200
        asked = urllib3.request("GET", f"{url}/swsnp/asked").json()
        assert [each["status"] for each in asked] == [429, 200]
    finally:
        stop(served, signal.SIGINT)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--misbehave", "mischief"), 3, "misbehaviour, trouble: got 'mischief'"),
        (("--misbehave", "slow:pause_s=x"), 3, "misbehaviour, pause_s: got 'x'"),
        (("--misbehave", "slow:pause_s"), 2, "--misbehave: got 'pause_s', wanted NAME=VALUE"),
        (("--misbehave", "slow:times=0"), 2, "misbehaviour, times: got 0"),
        (("--misbehave", "slow:x=0"), 3, "misbehaviour: got x, wanted"),
        (("--tls-cert", "x"), 2, "--tls-cert and --tls-key go together"),
        (("--product", "naples"), 2, "invalid choice"),
    ],
)
def test_serve_refuses(command: Command, arguments: tuple[str, ...], code: int, told: str) -> None:
    """Before a key is made."""
    got, _, err = command("kds", "serve", *arguments)
    assert (got, told in err) == (code, True), err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, today: Machine) -> Callable[..., tuple[Any, ...]]:
    """`serve` without its wait for keys."""
    monkeypatch.setattr(serve, "_machines", lambda options: [today])
    return lambda *arguments: (main(["kds", "serve", *arguments]),)


def test_ready_line(today: Machine) -> None:
    """One line for whoever waits: the address as a word, or all that --json tells."""
    assert serve._ready("http://h:1", [today], as_json=False) == "ready http://h:1"
    told = json.loads(serve._ready("http://h:1", [today], as_json=True))
    chip = {"product": today.product.value, "hwid": today.hwid.hex()}
    assert told == {"ready": True, "url": "http://h:1", "chips": [chip]}


def test_serve_where_nothing_can_listen(
    quick: Callable[..., tuple[int]], live: KdsServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """A port that is taken: exit code 4 and no ready line."""
    assert quick("--port", live.url.rpartition(":")[2]) == (4,)
    out, err = capsys.readouterr()
    assert out == ""
    assert "cannot be listened on" in err


def test_serve_with_tls_files_that_are_none(
    quick: Callable[..., tuple[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3."""
    (tmp_path / "pem").write_text("nothing")
    assert quick("--tls-cert", str(tmp_path / "pem"), "--tls-key", str(tmp_path / "pem")) == (3,)
    assert "cannot be used for TLS" in capsys.readouterr().err


def test_misbehaviour_words() -> None:
    """Numbers where numbers are wanted, text elsewhere."""
    assert serve._misbehaviour("slow:pause_s=2.5,times=3") == Misbehaviour(
        trouble=Trouble.SLOW, pause_s=2.5, times=3
    )
    assert serve._misbehaviour("throttled:retry_after=5,only=7") == Misbehaviour(
        trouble=Trouble.THROTTLED, retry_after="5", only="7"
    )
    with pytest.raises(InputError):
        serve._misbehaviour("")
