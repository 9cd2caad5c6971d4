"""Evidence of an emulated machine in files, in every form, and the command over them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import AttestationReport
from swsnp.amd_ca.kds_double import KdsDouble
from swsnp.amd_ca.kds_server import KdsServer
from swsnp.certs import table
from swsnp.certs.x509_reader import to_pem
from swsnp.cli import main

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from swsnp.machine import Machine

DATA = b"\x5a" * 64


@dataclass
class Files:
    """A folder with one report and what belongs to it; `verify` runs the command there."""

    folder: Path
    at: datetime
    measurement: str
    capture: pytest.CaptureFixture[str] = field(repr=False)
    data: str = DATA.hex()

    def __call__(self, name: str) -> str:
        return str(self.folder / name)

    def write(self, name: str, content: bytes | str) -> str:
        path = self.folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    @property
    def certified(self) -> tuple[str, ...]:
        """Options for the whole chain under the emulated root."""
        return ("--certs", self("table.bin"), "--roots", self("root.der"), "--at", self.at.isoformat())

    @property
    def wanted(self) -> tuple[str, ...]:
        """Options that say what is expected, rightly."""
        return ("--report-data", self.data, "--measurement", self.measurement)

    def verify(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error; a usage error is its exit code."""
        self.capture.readouterr()
        try:
            code = main(["verify", *arguments])
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = self.capture.readouterr()
        return code, captured.out, captured.err

    def json(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        code, out, _ = self.verify(*arguments, "--json")
        return code, json.loads(out)


def genuine_looking(content: dict[str, bytes], **changes: Any) -> bytes:
    """A report that does not carry the mark of an emulated chip; its signature is another's."""
    return bytes(AttestationReport.parse(content["report.bin"]).but(chip_id=bytes(range(64)), **changes))


@pytest.fixture(scope="module")
def service(seeded_machine: Machine) -> Any:
    """The key service of the machine, on a socket."""
    with KdsServer(KdsDouble([seeded_machine], now=seeded_machine.now)) as server:
        yield server


@pytest.fixture(scope="session")
def content(seeded_machine: Machine) -> dict[str, bytes]:
    """File name to content: one piece of evidence in every form in which it may come."""
    with seeded_machine.create_vm() as vm:
        vm.boot()
        answer = vm.extended_report(DATA)
    vcek, ask, ark = (each.data for each in table.parse(answer.certs))
    hierarchy = seeded_machine.hierarchy
    response = bytes(MsgReportRspHeader(report_size=len(answer.report))) + answer.report
    return {
        "report.bin": answer.report,
        "response.bin": response.ljust(4000, b"\0"),
        "hcl.bin": b"HCLA".ljust(32, b"\0") + answer.report + b"{}",
        "report.hex": answer.report.hex(" ", 16).encode(),
        "table.bin": answer.certs,
        "vcek.der": vcek,
        "vcek.pem": to_pem(vcek),
        "chain.pem": b"a text before\n" + to_pem(ask) + to_pem(ark),
        "all.pem": b"".join(map(to_pem, (ark, vcek, ask))),
        "ask.der": ask,
        "root.der": ark,
        "root.pem": to_pem(ark),
        "crl.der": hierarchy.crl(),
    }


@pytest.fixture
def files(
    content: dict[str, bytes],
    seeded_machine: Machine,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Files:
    """A fresh folder with the evidence; caches of the key service are kept in it too."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    measurement = AttestationReport.parse(content["report.bin"]).measurement.hex()
    return Files(tmp_path, seeded_machine.now(), measurement, capsys)
