"""Runs foreign verifiers in an environment of their own; it must not import swsnp.

Standard input: a JSON list of cases; standard output: a JSON list of {"good": …, "why": …}. The verifiers
that fetch certificates get those of the case through a transport that knows nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import sys
from typing import Any

_SERVICE = "https://kdsintf.amd.com/"


class _Answer:
    """What `requests.get` returns, as far as they look."""

    def __init__(self, content: bytes | None) -> None:
        self.status_code = 404 if content is None else 200
        self.content = content or b""

    def raise_for_status(self) -> None:
        if self.status_code != 200:
            raise RuntimeError("404")


def _pem(der: bytes) -> bytes:
    import base64

    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"


def _transport(case: dict[str, Any]) -> Any:
    leaf, intermediate, root, crl = (
        bytes.fromhex(case[each]) for each in ("leaf", "intermediate", "root", "crl")
    )

    def get(url: str, **options: Any) -> _Answer:
        del options
        kind, _, product, name = url.removeprefix(_SERVICE).split("?")[0].split("/")
        if product != case["product"] or kind != "vcek":
            return _Answer(None)
        known = {"cert_chain": _pem(intermediate) + _pem(root), "crl": crl or None}
        return _Answer(known.get(name, leaf))

    return get


def omne(case: dict[str, Any]) -> tuple[bool, str]:
    """omne-attest: parse, signature, chain with a pinned root, HWID and TCB, policy."""
    import omne_attest

    root = bytes.fromhex(case["root"])
    chain = (bytes.fromhex(case[name]) for name in ("leaf", "intermediate"))
    pin = hashlib.sha256(root).digest()
    try:
        policy = omne_attest.Policy(max_vmpl=3)
        omne_attest.verify(bytes.fromhex(case["report"]), *chain, root, pin, policy)
    except omne_attest.Fail as refused:
        return False, refused.kind.value
    return True, ""


def sev(case: dict[str, Any]) -> tuple[bool, str]:
    """sev-attest-tool: virtee/sev 2.0.2 in Rust; signature and chain, with Genoa's CAs built in."""
    import sev_attest_tool

    leaf = bytes.fromhex(case["leaf"])
    try:
        sev_attest_tool.verify_attestation_report(json.dumps(_fields(bytes.fromhex(case["report"]))), leaf)
    except BaseException as refused:  # it panics, and a panic is no Exception
        return False, str(refused).rpartition("error: ")[2].strip(' "})')
    return True, ""


def _fields(report: bytes) -> dict[str, Any]:
    """The report in that tool's JSON: version 2's fields, with later ones in the reserved bytes."""

    def number(start: int, size: int) -> int:
        return int.from_bytes(report[start : start + size], "little")

    def listed(start: int, end: int) -> list[int]:
        return list(report[start:end])

    def tcb(start: int) -> dict[str, Any]:
        raw = report[start : start + 8]
        levels = {"bootloader": raw[0], "tee": raw[1], "snp": raw[6], "microcode": raw[7]}
        return {**levels, "_reserved": list(raw[2:6])}

    return {
        "version": number(0, 4),
        "guest_svn": number(4, 4),
        "policy": number(8, 8),
        "family_id": listed(0x10, 0x20),
        "image_id": listed(0x20, 0x30),
        "vmpl": number(0x30, 4),
        "sig_algo": number(0x34, 4),
        "current_tcb": tcb(0x38),
        "plat_info": number(0x40, 8),
        "_author_key_en": number(0x48, 4),
        "_reserved_0": number(0x4C, 4),
        "report_data": listed(0x50, 0x90),
        "measurement": listed(0x90, 0xC0),
        "host_data": listed(0xC0, 0xE0),
        "id_key_digest": listed(0xE0, 0x110),
        "author_key_digest": listed(0x110, 0x140),
        "report_id": listed(0x140, 0x160),
        "report_id_ma": listed(0x160, 0x180),
        "reported_tcb": tcb(0x180),
        "_reserved_1": listed(0x188, 0x1A0),
        "chip_id": listed(0x1A0, 0x1E0),
        "committed_tcb": tcb(0x1E0),
        **{f"current_{name}": report[0x1E8 + n] for n, name in enumerate(("build", "minor", "major"))},
        "_reserved_2": report[0x1EB],
        **{f"committed_{name}": report[0x1EC + n] for n, name in enumerate(("build", "minor", "major"))},
        "_reserved_3": report[0x1EF],
        "launch_tcb": tcb(0x1F0),
        "_reserved_4": listed(0x1F8, 0x2A0),
        "signature": {
            "r": listed(0x2A0, 0x2E8),
            "s": listed(0x2E8, 0x330),
            "_reserved": listed(0x330, 0x4A0),
        },
    }


def cvm(case: dict[str, Any]) -> tuple[bool, str]:
    """cvm-attest: signature and chain as the key service gives it; no pin, no HWID, no TCB."""
    from cvm_attest.models import AttestationEvidence, TeeType
    from cvm_attest.snp import verify

    verify.requests.get = _transport(case)
    evidence = AttestationEvidence(tee_type=TeeType.SNP, raw_quote=bytes.fromhex(case["report"]))
    result = verify.verify_evidence(evidence)
    good = result.status.name == "PASS" and result.report_signature_valid and result.cert_chain_valid
    return bool(good), "; ".join([*result.errors, *result.warnings])


def secretvm(case: dict[str, Any]) -> tuple[bool, str]:
    """secretvm-verify: everything, with AMD's roots pinned, the CRL, and the order of TCBs."""
    from secretvm.verify import amd

    amd.requests.get = _transport(case)
    result = amd.check_sev_cpu_attestation(
        case["report"], product=case["product"], reload_amd_kds=True, strict=True
    )
    return bool(result.valid), "; ".join(result.errors)


JUDGES = {"omne-attest": omne, "sev-attest-tool": sev, "cvm-attest": cvm, "secretvm-verify": secretvm}


def main() -> None:
    """Judge every case."""
    found = []
    for case in json.load(sys.stdin):
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                good, why = JUDGES[case["judge"]](case)
            except Exception as error:  # its own trouble with the evidence is a refusal
                good, why = False, f"{type(error).__name__}: {error}"
        found.append({"good": good, "why": why})
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    os.environ["RUST_BACKTRACE"] = "0"
    main()
