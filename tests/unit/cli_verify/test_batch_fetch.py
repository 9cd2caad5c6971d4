"""`swsnp verify --batch --kds`: what rows lack is fetched politely, and no answer is taken for a verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.unit.cli_verify.conftest import genuine_looking

from swsnp.amd_ca.kds_double import KdsDouble
from swsnp.amd_ca.kds_server import KdsServer
from swsnp.certs.kds_errors import KdsContentError, KdsNotFound
from swsnp.cli.verify.batch_fetch import Fetcher
from swsnp.cli.verify.evidence import Evidence, Service
from swsnp.verify import Policy, Roots

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.unit.cli_verify.conftest import Files

    from swsnp.abi.snp_report import Product
    from swsnp.certs.kds_answer import KdsAnswer
    from swsnp.certs.kds_client import KdsClient
    from swsnp.certs.kds_url import KdsRequest, LeafKind
    from swsnp.machine import Machine

ROWS = 40


def batch(files: Files, reports: Sequence[bytes]) -> str:
    """Reports without a certificate."""
    path = files.folder / "bare.parquet"
    pq.write_table(pa.table({"report": pa.array(reports, pa.binary())}), path)
    return str(path)


def options(files: Files, service: KdsServer) -> tuple[str, ...]:
    """The emulated root, what is expected, the service, and a cache of the test's own."""
    trusted = ("--roots", files("root.der"), "--at", files.at.isoformat())
    return (*trusted, *files.wanted, "--kds", service.url, "--cache", files("cache"), "--out", files("out"))


def lines(files: Files) -> list[dict[str, Any]]:
    """The result lines, without the first."""
    return [json.loads(each) for each in Path(files("out")).read_text().splitlines()[1:]]


@pytest.mark.parametrize("engine", ["cryptography", "awscrt"])
def test_each_certificate_is_asked_for_once(
    files: Files, content: dict[str, bytes], service: KdsServer, engine: str
) -> None:
    """Forty rows of one chip, two workers: the leaf, the chain and, if required, the list; then none."""
    source, asked = batch(files, [content["report.bin"]] * ROWS), len(service.double.asked)
    policy = files.write("crl.toml", "require_crl = true\n")
    arguments = ("--batch", source, *options(files, service), "--policy", policy, "--jobs", "2")
    code, out, err = files.verify(*arguments, "--engine", engine)
    assert (code, err) == (0, "")
    assert out == f"{ROWS} reports: {ROWS} accepted, 0 authentic, 0 refused, 0 unreadable\n"
    assert len(service.double.asked) == asked + 3
    Path(files("out")).unlink()
    assert files.verify(*arguments, "--engine", engine, "--offline")[0] == 0
    assert len(service.double.asked) == asked + 3


def test_a_chip_that_the_service_does_not_know(
    files: Files, content: dict[str, bytes], service: KdsServer
) -> None:
    """404 is an answer about that chip: its rows are refused and say why, the others are judged."""
    unknown = genuine_looking(content)
    asked = len(service.double.asked)
    reports = [content["report.bin"], unknown, unknown, b"no report"]
    code, _, _ = files.verify("--batch", batch(files, reports), *options(files, service), "--jobs", "1")
    assert code == 1
    found = lines(files)
    assert [each["verdict"] for each in found] == ["accepted", "refused", "refused", "unreadable"]
    assert "kds" not in found[0]
    for each in found[1:3]:
        assert each["kds"].startswith(service.url)
        assert "C1" in [failure["check"] for failure in each["failures"]]
    assert len(service.double.asked) == asked + 3  # leaf and chain; the other leaf, once


def test_a_service_that_is_away_is_no_verdict(
    files: Files, content: dict[str, bytes], seeded_machine: Machine
) -> None:
    """Exit code 4 and no line for what was not judged; the next run goes on from there."""
    source = batch(files, [content["report.bin"]] * 3)
    with KdsServer(KdsDouble([seeded_machine], now=seeded_machine.now)) as server:
        arguments = ("--batch", source, *options(files, server))
        code, out, err = files.verify(*arguments, "--offline")
        assert (code, out) == (4, "")
        assert server.url in err
        assert lines(files) == []
        assert files.verify(*arguments)[0] == 0
    assert [each["verdict"] for each in lines(files)] == ["accepted"] * 3


def test_another_service_is_another_batch(
    files: Files, content: dict[str, bytes], service: KdsServer
) -> None:
    """What a verdict depends on stands in the first line."""
    source = batch(files, [content["report.bin"]])
    assert files.verify("--batch", source, *options(files, service))[0] == 0
    code, _, err = files.verify("--batch", source, *options(files, service), "--kds", "https://other.test")
    assert code == 2
    assert "another batch: kds differ" in err


def test_an_address_that_is_none(files: Files, content: dict[str, bytes], service: KdsServer) -> None:
    """Exit code 2, before a result file is begun."""
    source = batch(files, [content["report.bin"]])
    code, _, err = files.verify("--batch", source, *options(files, service), "--kds", "ftp://x")
    assert (code, "ftp://x" in err) == (2, True)
    assert not Path(files("out")).exists()


def test_rows_may_bring_what_they_have(files: Files, content: dict[str, bytes], service: KdsServer) -> None:
    """Only what a row lacks is fetched: the leaf beside a report, the chain from the service."""
    folder, asked = files.folder / "reports", len(service.double.asked)
    folder.mkdir()
    (folder / "a.bin").write_bytes(content["report.bin"])
    (folder / "a.vcek").write_bytes(content["vcek.der"])
    assert files.verify("--batch", str(folder), *options(files, service))[0] == 0
    (request,) = service.double.asked[asked:]
    assert "cert_chain" in str(request)


class Counting:
    """A client, and how often it was asked."""

    def __init__(self, client: KdsClient) -> None:
        self.client = client
        self.asked: list[str] = []

    def get(self, request: KdsRequest, **renew: bool) -> KdsAnswer:
        self.asked.append(type(request).__name__)
        return self.client.get(request, **renew)

    def crl(self, product: Product, kind: LeafKind) -> bytes:
        self.asked.append("crl")
        return self.client.crl(product, kind)


def test_answers_are_remembered(content: dict[str, bytes], tmp_path: Path, service: KdsServer) -> None:
    """The rows of one chip need the cache on the disk once."""
    made = Fetcher(Service(base=service.url, folder=tmp_path), None)
    made._client = counting = Counting(made._client)  # type: ignore[assignment]
    evidence = Evidence(
        roots=Roots.of(content["root.der"]), policy=Policy(require_crl=True), report=content["report.bin"]
    )
    first, second = made.complete(evidence), made.complete(evidence)
    assert first == second
    assert (len(first[0].certificates), len(first[0].crls), first[1]) == (3, 1, "")
    assert counting.asked == ["VcekRequest", "ChainRequest", "crl"]


class Client:
    """Gives nothing, for one reason."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason
        self.asked = 0

    def get(self, *_: object, **__: object) -> object:
        self.asked += 1
        raise self.reason

    crl = get


def fetcher(tmp_path: Path, reason: Exception) -> tuple[Fetcher, Client]:
    """One whose client gives nothing."""
    made = Fetcher(Service(base="https://kds.test", folder=tmp_path), None)
    client = Client(reason)
    made._client = client  # type: ignore[assignment]
    return made, client


def test_an_absence_is_remembered(content: dict[str, bytes], tmp_path: Path) -> None:
    """Ten thousand rows of an unknown chip are one request."""
    made, client = fetcher(tmp_path, KdsNotFound("https://kds.test/x", "404"))
    evidence = Evidence(roots=Roots.amd(), policy=Policy(), report=content["report.bin"])
    for _ in range(3):
        assert made.complete(evidence) == (evidence, "https://kds.test/x: 404")
    assert client.asked == 1


def test_an_absent_list_is_no_absent_certificate(content: dict[str, bytes], tmp_path: Path) -> None:
    """A row that lacks its list alone says nothing of the rows that lack nothing."""
    made, client = fetcher(tmp_path, KdsNotFound("https://kds.test/crl", "404"))
    whole = Evidence(
        roots=Roots.amd(),
        policy=Policy(require_crl=True),
        report=content["report.bin"],
        table=content["table.bin"],
    )
    listed = replace(whole, crls=(b"list",))
    assert made.complete(whole) == (whole, "https://kds.test/crl: 404")
    assert made.complete(listed) == (listed, "")
    assert made.complete(whole) == (whole, "https://kds.test/crl: 404")
    assert client.asked == 1


def test_a_wrong_answer_ends_the_run(content: dict[str, bytes], tmp_path: Path) -> None:
    """What is not what was asked for says nothing of any report."""
    made, _ = fetcher(tmp_path, KdsContentError("https://kds.test/x", "another chip's"))
    with pytest.raises(KdsContentError):
        made.complete(Evidence(roots=Roots.amd(), policy=Policy(), report=content["report.bin"]))
