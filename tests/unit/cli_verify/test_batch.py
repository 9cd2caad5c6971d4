"""`swsnp verify --batch`: rows of a directory or a Parquet file, results that survive a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swsnp.cli.inputs import LARGEST
from swsnp.cli.verify import batch_rows
from swsnp.cli.verify.batch_results import SCHEMA, ResultFile
from swsnp.cli.verify.batch_rows import (
    DirectorySource,
    ParquetSource,
    Place,
    Row,
    _split,
    open_source,
    read_row,
)
from swsnp.cli.verify.batch_work import Judge
from swsnp.cli.verify.evidence import Evidence
from swsnp.errors import HostError, InputError, SwsnpError, UsageError
from swsnp.verify import Policy, Roots

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.unit.cli_verify.conftest import Files


def results(path: str | Path) -> list[dict[str, Any]]:
    """The lines after the first; all of them are as `json` writes them."""
    written = Path(path).read_text().splitlines()
    lines = [json.loads(line) for line in written]
    assert [json.dumps(line) for line in lines] == written
    assert lines[0]["schema"] == SCHEMA
    return lines[1:]


def directory(files: Files, content: dict[str, bytes]) -> str:
    """Reports of every kind: good in three forms, forged, no report, too large, one with its own files."""
    folder = files.folder / "reports"
    (folder / "below").mkdir(parents=True)
    report = content["report.bin"]
    for name, data in {
        "a.bin": report,
        "b.response": content["response.bin"],
        "below/c.hex": content["report.hex"],
        "d.forged": report[:0x90] + b"\0" + report[0x91:],
        "e.txt": b"not a report\n",
        "f.large": bytes((1 << 20) + 1),
        "own.bin": report,
        "own.vcek": content["vcek.der"],
        "own.report_data": files.data.encode(),
        "own.measurement": bytes.fromhex(files.measurement),
        ".hidden": b"never a row",
    }.items():
        (folder / name).write_bytes(data)
    (folder / "gone").symlink_to(folder / "nothing")
    return str(folder)


def parquet(files: Files, content: dict[str, bytes], rows: int = 40) -> str:
    """A file with all columns; every seventh row is refused, every eleventh unreadable."""
    report, certs = content["report.bin"], content["table.bin"]
    forged = report[:0x90] + b"\0" + report[0x91:]
    reports = [None if n % 11 == 10 else forged if n % 7 == 6 else report for n in range(rows)]
    table = pa.table(
        {
            "note": [f"row {n}" for n in range(rows)],
            "report": pa.array(reports, pa.binary()),
            "certs": pa.array([certs] * rows, pa.binary()),
            "report_data": pa.array([files.data] * rows, pa.string()),
            "measurement": pa.array([bytes.fromhex(files.measurement)] * rows, pa.binary(48)),
        }
    )
    path = files.folder / "reports.parquet"
    pq.write_table(table, path, row_group_size=16)
    return str(path)


def roots(files: Files) -> tuple[str, ...]:
    return ("--roots", files("root.der"), "--at", files.at.isoformat())


def test_names_of_any_kind(files: Files, content: dict[str, bytes]) -> None:
    """A line is JSON whatever the row is called."""
    name, out = 'say "\u00fc\\".bin', files("out.jsonl")
    folder = files.folder / "one"
    folder.mkdir()
    (folder / name).write_bytes(content["report.bin"])
    assert files.verify("--batch", str(folder), *files.certified, *files.wanted, "--out", out)[0] == 0
    assert [(each["row"], each["verdict"]) for each in results(out)] == [(name, "accepted")]


def test_directory(files: Files, content: dict[str, bytes]) -> None:
    """One result for each file, in order; an unreadable one is a result and not the end."""
    out = files("out.jsonl")
    code, said, err = files.verify(
        "--batch", directory(files, content), *files.certified, *files.wanted, "--out", out
    )
    assert (code, err) == (1, "")
    assert said == "8 reports: 4 accepted, 0 authentic, 1 refused, 3 unreadable\n"
    found = {each["row"]: each for each in results(out)}
    assert list(found) == sorted(found)
    assert {row: each["verdict"] for row, each in found.items()} == {
        "a.bin": "accepted",
        "b.response": "accepted",
        "below/c.hex": "accepted",
        "d.forged": "refused",
        "e.txt": "unreadable",
        "f.large": "unreadable",
        "gone": "unreadable",
        "own.bin": "accepted",
    }
    assert "R1" in [each["check"] for each in found["d.forged"]["failures"]]
    assert "got 13 bytes" in found["e.txt"]["error"]
    assert "more than 1048576 bytes" in found["f.large"]["error"]
    assert "is gone" in found["gone"]["error"]
    assert found["a.bin"]["product"] == "Milan"
    assert len(found["a.bin"]["sha256"]) == 64


def test_files_beside_a_report(files: Files, content: dict[str, bytes]) -> None:
    """`x.vcek`, `x.report_data` and `x.measurement` belong to `x` alone: bytes, or hexadecimal text."""
    folder = directory(files, content)
    out = files("out.jsonl")
    files.verify("--batch", folder, "--chain", files("chain.pem"), *roots(files), "--out", out)
    verdicts = {each["row"]: each["verdict"] for each in results(out)}
    assert verdicts["own.bin"] == "accepted"
    assert verdicts["a.bin"] == "refused"


@pytest.mark.parametrize("engine", ["cryptography", "awscrt"])
def test_parquet(files: Files, content: dict[str, bytes], engine: str) -> None:
    """Columns `report`, `certs`, `report_data`, `measurement`; others are passed over; both engines agree."""
    out = files("out.jsonl")
    arguments = ("--batch", parquet(files, content), *roots(files), "--out", out, "--jobs", "2")
    code, summary = files.json(*arguments, "--engine", engine)
    assert code == 1
    verdicts = Counter(each["verdict"] for each in results(out))
    assert [each["row"] for each in results(out)] == list(range(40))
    expected = Counter(
        "unreadable" if n % 11 == 10 else "refused" if n % 7 == 6 else "accepted" for n in range(40)
    )
    assert verdicts == expected
    assert summary == {"rows": 40, "authentic": 0, **expected, "earlier": 0, "out": out}


def test_without_out_results_go_to_standard_output(files: Files, content: dict[str, bytes]) -> None:
    """Result lines on standard output, the summary on standard error."""
    code, out, err = files.verify("--batch", directory(files, content), *files.certified, *files.wanted)
    assert code == 1
    assert len([json.loads(line) for line in out.splitlines()]) == 8
    assert err.startswith("8 reports: ")


def test_exit_code_is_good_only_if_every_row_is(files: Files, content: dict[str, bytes]) -> None:
    """0 when all are accepted; with --authentic-only also when all are authentic; no report at all is 3."""
    folder = files.folder / "good"
    folder.mkdir()
    (folder / "a.bin").write_bytes(content["report.bin"])
    batch = ("--batch", str(folder), *files.certified)
    assert files.verify(*batch, *files.wanted)[0] == 0
    assert files.verify(*batch)[0] == 1
    assert files.verify(*batch, "--authentic-only")[0] == 0
    (folder / "a.bin").unlink()
    code, _, err = files.verify(*batch)
    assert code == 3
    assert "holds no file, wanted reports" in err


def test_goes_on_and_repeats_nothing(files: Files, content: dict[str, bytes]) -> None:
    """A finished result file stays as it is; a part of one is completed to the same bytes, torn or not."""
    whole, part = files("whole.jsonl"), Path(files("part.jsonl"))
    arguments = ("--batch", parquet(files, content), *roots(files), "--jobs", "2")
    files.verify(*arguments, "--out", whole)
    data = Path(whole).read_bytes()
    files.verify(*arguments, "--out", whole)
    assert Path(whole).read_bytes() == data
    ends = [at for at, byte in enumerate(data) if byte == ord("\n")]
    for cut in (0, 1, 20, ends[0], ends[0] + 1, ends[3] - 5, ends[3] + 1, ends[20] + 7, len(data) - 1):
        part.write_bytes(data[:cut])
        assert files.verify(*arguments, "--out", str(part))[0] == 1
        assert part.read_bytes() == data, cut


def test_zeros_after_a_crash(files: Files, content: dict[str, bytes]) -> None:
    """A file system may leave zeros where the last chunk was to stand: they are cut off."""
    out = Path(files("out.jsonl"))
    arguments = ("--batch", parquet(files, content), *roots(files), "--out", str(out))
    files.verify(*arguments)
    data = out.read_bytes()
    out.write_bytes(data[: len(data) // 2].rpartition(b"\n")[0] + b"\n" + bytes(300))
    files.verify(*arguments)
    assert out.read_bytes() == data


def test_time_of_the_first_run_counts(files: Files, content: dict[str, bytes]) -> None:
    """A run that goes on judges at the time of the first one, so that all rows have one time."""
    out = Path(files("out.jsonl"))
    batch = ("--batch", parquet(files, content), "--roots", files("root.der"), "--out", str(out))
    files.verify(*batch, "--at", files.at.isoformat())
    data = out.read_bytes()
    out.write_bytes(data[:1000])
    files.verify(*batch)
    assert out.read_bytes() == data


def test_results_of_other_settings_are_left_alone(files: Files, content: dict[str, bytes]) -> None:
    """Another policy, time, source or expectation is another batch: exit code 2 names what differs."""
    out = Path(files("out.jsonl"))
    source = parquet(files, content)
    files.verify("--batch", source, *roots(files), "--out", str(out))
    data = out.read_bytes()
    policy = files.write("p.toml", "allow_debug = true\n")
    for arguments, name in (
        ((source, *roots(files), "--policy", policy), "inputs"),
        ((source, "--roots", files("root.der"), "--at", "2027-01-01"), "at"),
        ((source, *roots(files), "--measurement", "00" * 48), "measurement"),
        ((source, *roots(files), "--product", "milan"), "product"),
        ((directory(files, content), *roots(files)), "source"),
    ):
        code, _, err = files.verify("--batch", *arguments, "--out", str(out))
        assert code == 2
        assert f"holds results of another batch: {name} differ" in err
    assert out.read_bytes() == data


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("precious notes\n", 2, "is no result file"),
        ('{"schema": "other"}\n', 2, "is no result file"),
        ("no newline", 2, "is no result file"),
        (f'{{"schema": "{SCHEMA}"}}\nbroken\n{{"row": 1, "verdict": "accepted"}}\n', 3, "line 2 is broken"),
        (f'{{"schema": "{SCHEMA}"}}\n{{"row": 1}}\n', 3, "line 2 is no result"),
        (f'{{"schema": "{SCHEMA}"}}\n{{"row": [1], "verdict": "x"}}\n', 3, "line 2 is no result"),
        (f'{{"schema": "{SCHEMA}"}}\n' + '{"row": 1, "verdict": "x"}\n' * 2, 3, "row 1 stands twice"),
        (f'{{"schema": "{SCHEMA}", "at": "soon"}}\n', 3, "wanted a time"),
    ],
)
def test_foreign_files_are_not_overwritten(
    files: Files, content: dict[str, bytes], text: str, code: int, message: str
) -> None:
    """What is no result file, or not a sound one, is named and left as it is."""
    out = files.write("out.jsonl", text)
    got, _, err = files.verify("--batch", parquet(files, content), "--roots", files("root.der"), "--out", out)
    assert got == code
    assert message in err
    assert Path(out).read_text() == text


def test_two_runs_at_once(files: Files, content: dict[str, bytes]) -> None:
    """The second run on one result file is refused while the first holds it."""
    out = Path(files("out.jsonl"))
    with ResultFile(out):
        code, _, err = files.verify("--batch", parquet(files, content), *roots(files), "--out", str(out))
    assert code == 2
    assert "another run is writing it" in err


def test_result_file_cannot_be_written(files: Files, content: dict[str, bytes]) -> None:
    """A directory in its place, or none above it: exit code 2, by name. A full disk too."""
    source = parquet(files, content)
    for name in (".", "none/out.jsonl"):
        code, _, err = files.verify("--batch", source, *roots(files), "--out", files(name))
        assert code == 2
        assert "cannot be written" in err


def test_full_disk(files: Files, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails ends the run with exit code 2; what stands in the file is gone on with later."""
    out = files("out.jsonl")
    arguments = ("--batch", parquet(files, content), *roots(files), "--out", out, "--jobs", "1")

    def full(descriptor: int) -> None:
        del descriptor
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        code, _, err = files.verify(*arguments)
    assert code == 2
    assert "cannot be written: No space left on device" in err
    assert files.verify(*arguments)[0] == 1
    assert [each["row"] for each in results(out)] == list(range(40))


def test_results_in_the_directory_that_is_judged(files: Files, content: dict[str, bytes]) -> None:
    """The result file is no row, on no run."""
    folder = directory(files, content)
    arguments = ("--batch", folder, *files.certified, "--out", f"{folder}/results.jsonl")
    for _ in range(2):
        files.verify(*arguments)
        assert len(results(f"{folder}/results.jsonl")) == 8


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"raport": [b"x"]}, "has no column `report`; its columns are: raport"),
        ({"report": [1]}, "column `report` is int64, wanted binary"),
        ({"report": [b"x"], "certs": [0.5]}, "column `certs` is double, wanted binary"),
        ({"report": pa.array([], pa.binary())}, "has no rows"),
    ],
)
def test_parquet_of_another_form(files: Files, columns: dict[str, Any], message: str) -> None:
    """A missing column, another type, no row: exit code 3 and its name."""
    pq.write_table(pa.table(columns), files("x.parquet"))
    code, _, err = files.verify("--batch", files("x.parquet"))
    assert code == 3
    assert message in err


def test_what_is_no_source(files: Files, content: dict[str, bytes]) -> None:
    """A report, a torn Parquet file, nothing: exit code 3 and one line."""
    torn = Path(parquet(files, content)).read_bytes()
    for name, message in (
        (files("report.bin"), "wanted a directory or a Parquet file"),
        (files.write("torn", torn[:-100]), "cannot be read as Parquet"),
        (files.write("empty", b""), "wanted a directory or a Parquet file"),
        (files("nothing"), "cannot be read"),
        ("a\0b", "cannot be read"),
    ):
        code, out, err = files.verify("--batch", name)
        assert (code, out) == (3, "")
        assert message in err
        assert err.count("\n") == 1


def test_damage_inside_a_parquet_file(files: Files, content: dict[str, bytes]) -> None:
    """Pages that cannot be read end the run with exit code 3 and the row; the results before stay."""
    path = Path(parquet(files, content, rows=4000))
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 4000] = b"\xff" * 4000
    path.write_bytes(bytes(data))
    out = files("out.jsonl")
    code, _, err = files.verify("--batch", str(path), *roots(files), "--out", out, "--jobs", "1")
    assert code == 3
    assert "or after: cannot be read" in err
    assert Path(out).read_bytes().endswith(b"\n")


def test_without_pyarrow(files: Files, content: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet needs an extra: exit code 4 and the remedy; a directory does not."""
    source = parquet(files, content)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    code, _, err = files.verify("--batch", source)
    assert code == 4
    assert "pip install 'swsnp[batch]'" in err
    assert files.verify("--batch", directory(files, content), *files.certified, *files.wanted)[0] == 1


def judge_of(files: Files) -> Judge:
    """AMD's roots, the default policy, and nothing wanted besides."""
    return Judge(
        evidence=Evidence(roots=Roots.amd(), policy=Policy()),
        engine="cryptography",
        product=None,
        like=None,
        at=files.at,
        report_data=None,
        measurement=None,
    )


class Given(list[tuple[int | str, Row]]):
    """Rows as a test has them."""

    def rows(self) -> Iterator[tuple[int | str, Row]]:
        return iter(self)


@pytest.mark.parametrize("name", [7, "a/b.bin", 'a "quoted" name\\', "\n", "\udcff"])
def test_row_names(files: Files, content: dict[str, bytes], name: int | str) -> None:
    """RFC 8259: whatever a file is called, its line is JSON and gives the name back."""
    (line,), _ = judge_of(files).start()(Given([(name, Row(content["report.bin"]))]))
    assert json.loads(line)["row"] == name
    assert line.count("\n") == 0


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (Row(None), "report: got nothing"),
        (Row("xyz"), "report: got text that is not hexadecimal"),
        (Row(b"x"), "report: got 1 bytes"),
        (Row(b"", error="too bad"), "too bad"),
        (Row(b"R", certs=b"x"), "certs: got 1 bytes"),
        (Row(b"R", vcek=b"R"), "vcek: got attestation report, wanted certificates"),
        (Row(b"R", report_data=b"abc"), "report_data: got text that is not hexadecimal"),
        (Row(b"R", report_data="00"), "report_data: got 1 bytes, wanted 64"),
        (Row(b"R", measurement="00" * 47), "measurement: got 47 bytes, wanted 48"),
    ],
)
def test_unreadable_rows(files: Files, content: dict[str, bytes], row: Row, error: str) -> None:
    """What cannot be read in a row is named by its column."""
    judge = judge_of(files)
    real = content["report.bin"]
    report, vcek = (real if each == b"R" else each for each in (row.report, row.vcek))
    row = row._replace(report=report, vcek=vcek)
    (line,), verdicts = judge.start()(Given([(7, row)]))
    assert verdicts == ["unreadable"]
    assert json.loads(line)["row"] == 7
    assert error in json.loads(line)["error"]


@given(st.lists(st.sampled_from(["a", "b/c", "d.bin", ".h", "e.vcek", "b/f.certs"]), unique=True))
def test_directory_rows(names: list[str]) -> None:
    """Rows are the files in order, but hidden ones and those beside a report; what is done is passed over."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            path = Path(folder) / name
            path.parent.mkdir(exist_ok=True)
            path.touch()
        wanted = sorted(set(names) & {"a", "b/c", "d.bin"})
        try:
            source = DirectorySource(Path(folder))
        except InputError:
            assert wanted == []
            return
        assert [row for chunk in source.chunks(2, ()) for row, _ in chunk.rows()] == wanted
        assert [row for chunk in source.chunks(2, {"a"}) for row, _ in chunk.rows()] == [
            name for name in wanted if name != "a"
        ]
        assert len(source) == len(wanted)


@given(st.text("ab._é", min_size=1, max_size=6).filter(lambda name: name.strip(".")))
def test_a_name_is_split_as_pathlib_does(name: str) -> None:
    """What stands beside a report differs in the suffix alone, whatever has dots."""
    assert _split(name) == (Path(name).stem, Path(name).suffix[1:])


def test_what_stands_beside_a_report(tmp_path: Path) -> None:
    """All columns, by whole stems; one that is gone, or is no file, makes the row unreadable, not shorter."""
    (tmp_path / "c.d").mkdir()
    for name in (
        "a.bin",
        "a.certs",
        "a.measurement",
        "b",
        "b.vcek",
        "c.d/a.b.bin",
        "c.d/a.b.report_data",
        "f",
    ):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "f.vcek").mkdir()
    rows = {row: given for chunk in DirectorySource(tmp_path).chunks(9, ()) for row, given in chunk.rows()}
    assert rows == {
        "a.bin": Row(b"a.bin", certs=b"a.certs", measurement=b"a.measurement"),
        "b": Row(b"b", vcek=b"b.vcek"),
        "c.d/a.b.bin": Row(b"c.d/a.b.bin", report_data=b"c.d/a.b.report_data"),
        "f": Row(None, error=f"{tmp_path / 'f.vcek'}: cannot be read: Is a directory"),
    }
    (tmp_path / "b.vcek").unlink()
    assert read_row(Place(str(tmp_path / "b"), ("vcek",))).error.endswith("b.vcek: is gone")


@pytest.mark.parametrize("size", [0, 1, (1 << 14) - 1, 1 << 14, (1 << 14) + 1, LARGEST, LARGEST + 1])
def test_files_are_read_whole(tmp_path: Path, size: int) -> None:
    """Up to the limit every byte, in whatever pieces; beyond it none."""
    path, data = tmp_path / "a.bin", os.urandom(size)
    path.write_bytes(data)
    row = read_row(Place(str(path), ()))
    assert (row.report, bool(row.error)) == ((data, False) if size <= LARGEST else (None, True))


def test_unreadable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory below that cannot be listed is not passed over in silence."""
    below, scandir = tmp_path / "below", os.scandir
    below.mkdir()

    def refuse(path: str) -> Any:
        if path == str(below):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(InputError, match=f"{below}: cannot be read: Permission denied"):
        open_source(str(tmp_path))


def test_files_that_cannot_be_rows(tmp_path: Path) -> None:
    """A row is read as far as files may be large, and what cannot be read is named."""
    (tmp_path / "most").write_bytes(bytes(LARGEST))
    (tmp_path / "more").write_bytes(bytes(LARGEST + 1))
    (tmp_path / "folder").mkdir()
    most, more, folder, gone = (str(tmp_path / each) for each in ("most", "more", "folder", "gone"))
    assert read_row(Place(most, ())).report == bytes(LARGEST)
    assert read_row(Place(more, ())).error == f"{more}: got more than {LARGEST} bytes"
    assert read_row(Place(folder, ())).error == f"{folder}: cannot be read: Is a directory"
    assert read_row(Place(gone, ())).error == f"{gone}: is gone"


def test_a_worker_that_has_not_begun() -> None:
    """A chunk is judged with the settings of its run, or not at all."""
    from swsnp.cli.verify import batch_work

    with pytest.raises(RuntimeError, match="has not begun"):
        batch_work._chunk_in_process(Given())


def test_parquet_identity(files: Files, content: dict[str, bytes]) -> None:
    """A file with other rows is another source."""
    first = ParquetSource(Path(parquet(files, content))).identity()
    assert ParquetSource(Path(parquet(files, content, rows=41))).identity() != first


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 70),
    group=st.sampled_from([1, 3, 20, 100]),
    size=st.sampled_from([1, 7, 16, 40, 100]),
    done=st.sets(st.integers(0, 40)),
    hexadecimal=st.booleans(),
)
def test_parquet_rows(rows: int, group: int, size: int, done: set[int | str], hexadecimal: bool) -> None:
    """Every row that is left, once and in order with its own values, in full chunks, whatever the groups."""
    import tempfile

    reports = [number.to_bytes(2, "big") for number in range(rows)]
    data = [None if number % 3 == 0 else f"{number:04x}" for number in range(rows)]
    columns = {
        "report": pa.array([each.hex() for each in reports] if hexadecimal else reports),
        "other": pa.array(range(rows)),
        "report_data": pa.array(data, pa.string()),
    }
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_rows, "_ROWS_AT_ONCE", 16)
        path = Path(folder) / "r.parquet"
        pq.write_table(pa.table(columns), path, row_group_size=group)
        chunks = [list(each.rows()) for each in ParquetSource(path).chunks(size, done)]
    left = [number for number in range(rows) if number not in done]
    assert [row for chunk in chunks for row, _ in chunk] == left
    assert [len(each) for each in chunks] == [min(size, len(left) - at) for at in range(0, len(left), size)]
    for number, row in (each for chunk in chunks for each in chunk):
        assert isinstance(number, int)
        report = columns["report"][number].as_py()
        assert row == Row(report, report_data=data[number])


def test_dead_worker() -> None:
    """A worker process that dies ends the run with exit code 4; it can be gone on with."""
    from swsnp.cli.verify import batch_work

    def die(items: Any) -> Any:
        raise BrokenProcessPool("killed")

    with pytest.raises(HostError, match="run again to go on"):
        list(batch_work.judged(_failing(die), [Given()], 1))


def _failing(action: Any) -> Any:
    from concurrent.futures import Future

    def submit(items: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(action(items))
        except Exception as error:
            future.set_exception(error)
        return future

    return submit


@settings(deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_as_a_result_file(data: bytes) -> None:
    """Whatever stands in the file: it is gone on with, or refused by name and left as it is."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out"
        path.write_bytes(data)
        try:
            with ResultFile(path) as file:
                file.begin({"schema": SCHEMA})
        except (UsageError, InputError):
            assert path.read_bytes() == data
        else:
            assert path.read_bytes().startswith(b'{"schema"')


def start(arguments: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "swsnp", "verify", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cryptography", "awscrt"])
def test_survives_kills(files: Files, content: dict[str, bytes], engine: str) -> None:
    """SIGKILL several times at growing progress: afterwards the file equals that of an undisturbed run."""
    rows = 3000
    batch = ("--batch", parquet(files, content, rows=rows), *roots(files), "--engine", engine, "--jobs", "2")
    undisturbed, killed = Path(files("undisturbed.jsonl")), Path(files("killed.jsonl"))
    assert files.verify(*batch, "--out", str(undisturbed))[0] == 1
    size, kills = undisturbed.stat().st_size, 0
    for part in range(1, 5):
        run = start((*batch, "--out", str(killed)))
        while run.poll() is None and (not killed.exists() or killed.stat().st_size < size * part // 6):
            time.sleep(0.005)
        if run.poll() is None:
            run.send_signal(signal.SIGKILL)
            kills += 1
        run.communicate()
        assert undisturbed.read_bytes().startswith(killed.read_bytes().rpartition(b"\n")[0])
    assert kills >= 2
    last = start((*batch, "--out", str(killed)))
    out, err = last.communicate(timeout=120)
    assert (last.returncode, err) == (1, b"")
    assert b"of them in an earlier run" in out
    assert killed.read_bytes() == undisturbed.read_bytes()
    assert [each["row"] for each in results(killed)] == list(range(rows))


@pytest.mark.slow
def test_no_worker_is_left_behind(files: Files, content: dict[str, bytes]) -> None:
    """Worker processes end when the run is killed: none waits for work for ever."""
    arguments = ("--batch", parquet(files, content, rows=20_000), *roots(files), "--engine", "awscrt")
    out = Path(files("out.jsonl"))
    with start((*arguments, "--out", str(out), "--jobs", "2")) as run:
        while not out.exists() or out.stat().st_size < 2000:
            assert run.poll() is None
            time.sleep(0.01)
        workers = children(run.pid)
        run.send_signal(signal.SIGKILL)
    assert len(workers) >= 2
    deadline = time.monotonic() + 20
    while left := [each for each in workers if Path(f"/proc/{each}/exe").exists()]:
        if time.monotonic() > deadline:
            for each in left:
                os.kill(each, signal.SIGKILL)
            pytest.fail(f"{len(left)} workers are left")
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    """Process ids of the direct children."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_progress_on_a_terminal_only(files: Files, content: dict[str, bytes]) -> None:
    """A bar on standard error when that is a terminal, and nothing when it is not."""
    arguments = ("--batch", directory(files, content), *files.certified, "--out", files("out.jsonl"))
    command = [sys.executable, "-m", "swsnp", "verify", *arguments]
    quiet = subprocess.run(command, capture_output=True, check=False)
    assert quiet.stderr == b""
    Path(files("out.jsonl")).unlink()
    ours, theirs = os.openpty()
    shown: list[bytes] = []
    reader = threading.Thread(target=read_all, args=(ours, shown))
    reader.start()
    env = {**os.environ, "TERM": "xterm"}
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=theirs, check=False, env=env)
    os.close(theirs)
    reader.join(timeout=20)
    assert done.returncode == 1
    assert b"8/8" in b"".join(shown)


def read_all(descriptor: int, into: list[bytes]) -> None:
    """Read a terminal until its other side is closed."""
    while True:
        try:
            data = os.read(descriptor, 4096)
        except OSError:
            return
        if not data:
            return
        into.append(data)


def test_errors_are_the_projects_own(tmp_path: Path) -> None:
    """Every refusal above is a `SwsnpError`, so that the command line turns it into one line."""
    assert issubclass(InputError, SwsnpError)
    with pytest.raises(SwsnpError):
        open_source(str(tmp_path / "none"))
