"""What some bytes are: by their content, never by a file's name.

Two kinds of marks are looked for. A strong one hardly comes about by chance: a magic number, a length that is
told inside, a known GUID. A weak one is mere shape. Weak marks count only where there is no strong one, and
bytes with two marks of equal strength are refused rather than guessed at: REPORT_DATA and FAMILY_ID are the
guest's to choose, a table's entries are the host's.

| form | strong mark | weak mark |
|---|---|---|
| attestation report | 1,184 bytes, VERSION 1 to 255 | 1,184 bytes |
| MSG_REPORT_RSP | REPORT_SIZE 1,184, reserved bytes zero | 4,000 bytes with a STATUS |
| HCL envelope | begins with "HCLA" | |
| certificate, CRL | one DER SEQUENCE that is all of the bytes | |
| PEM | "-----BEGIN" in a text | |
| certificate table | the first entry has a known GUID, in either byte order | any well-formed table |
| hex text | hexadecimal digits and white space that spell one of the first three | |

Source: AMD 56860 for reports, AMD 56421 for the table, RFC 7468 for PEM, X.690 for DER.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final

from swsnp.abi.sev_guest import SnpReportResp
from swsnp.abi.snp_message import MsgReportRspHeader
from swsnp.abi.snp_report import REPORT_SIZE
from swsnp.certs import der
from swsnp.certs.der import Der
from swsnp.certs.table import begins_with_known_guid, parse
from swsnp.certs.x509_reader import to_der
from swsnp.errors import InputError, LayoutError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Classified",
    "Form",
    "LOOKED_FOR",
    "classify",
    "form_of",
    "report_from_hcl",
    "report_from_response",
]

_HCL_MAGIC: Final = b"HCLA"
_HCL_HEADER: Final = 0x20
_PEM_MARK: Final = b"-----BEGIN"
_PEM_CERTIFICATE: Final = b"-----BEGIN CERTIFICATE-----"
_PEM_CRL: Final = b"-----BEGIN X509 CRL-----"
_HEX_DIGITS: Final = b"0123456789abcdefABCDEF \t\r\n"
_TIMES: Final = (der.UTC_TIME, der.GENERALIZED_TIME)
_SHOWN: Final = 16


class Form(StrEnum):
    """The forms that are told apart; the values are for people."""

    REPORT = "attestation report"
    RESPONSE = "MSG_REPORT_RSP"
    HCL = "HCL envelope"
    CERTIFICATE = "DER certificate"
    CRL = "DER CRL"
    PEM = "PEM"
    TABLE = "certificate table"
    REPORT_TEXT = "hex text of a report"


LOOKED_FOR: Final = ", ".join(Form)
"""Every form by name, for error texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Classified:
    """What `classify` found. Nothing in it has been judged: readers and the verifier do that.

    Attributes:
        form: which form it is.
        report: the 1,184 bytes of the report, for the four forms that hold one.
        certificates: DER, for a certificate and for PEM in the order of the blocks.
        crls: DER, likewise.
        table: the bytes as they came, for a certificate table.
    """

    form: Form
    report: bytes | None = field(default=None, repr=False)
    certificates: tuple[bytes, ...] = field(default=(), repr=False)
    crls: tuple[bytes, ...] = field(default=(), repr=False)
    table: bytes | None = field(default=None, repr=False)


def classify(data: bytes, name: str = "input") -> Classified:
    """Tell the form of some bytes, and take out of it what it holds.

    Args:
        data: a whole file.
        name: the file's name, for error texts only.

    Raises:
        InputError: no form that is known here, two at once, or one that holds nothing: a MSG_REPORT_RSP with
            a status, PEM whose blocks are cut off or of other kinds.
    """
    form = form_of(data, name)
    try:
        return _CONTENT[form](data)
    except (InputError, LayoutError) as error:
        raise InputError(f"{name}: {error}") from None


def form_of(data: bytes, name: str = "input") -> Form:
    """The form alone; what is inside may still be broken.

    Raises:
        InputError: no form that is known here, or two at once.
    """
    for marks in (_STRONG, _WEAK):
        found = [form for form, has_mark in marks if has_mark(data)]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(f"{name}: both {' and '.join(found)} by content; convert it to one form")
    raise InputError(f"{name}: got {_sketch(data)}, wanted one of: {LOOKED_FOR}")


def _sketch(data: bytes) -> str:
    """What some unknown bytes look like, in a few words."""
    if not data:
        return "0 bytes"
    if data[0] == der.SEQUENCE:
        return f"{len(data)} bytes that begin like DER, {_der_trouble(data)}"
    return f"{len(data)} bytes that begin with {data[:_SHOWN].hex()}"


def _der_trouble(data: bytes) -> str:
    """Why these bytes are neither a certificate nor a CRL."""
    try:
        der.unwrap(data, der.SEQUENCE, "DER")
    except LayoutError as error:
        return f"but {error}"
    return "but are neither a certificate nor a CRL"


def _is_report(data: bytes) -> bool:
    return len(data) == REPORT_SIZE and 0 < int.from_bytes(data[:4], "little") <= 0xFF


def _has_size_of_report(data: bytes) -> bool:
    return len(data) == REPORT_SIZE


def _response_header(data: bytes) -> MsgReportRspHeader | None:
    if len(data) < MsgReportRspHeader.SIZE:
        return None
    header = MsgReportRspHeader.parse(data[: MsgReportRspHeader.SIZE])
    return None if any(header.reserved_08) else header


def _is_response(data: bytes) -> bool:
    header = _response_header(data)
    return header is not None and header.report_size == REPORT_SIZE


def _is_refusal(data: bytes) -> bool:
    """The driver's buffer when the firmware answered with a status."""
    header = _response_header(data)
    return len(data) == SnpReportResp.SIZE and header is not None and header.status != 0


def _is_hcl(data: bytes) -> bool:
    return data.startswith(_HCL_MAGIC)


def _is_pem(data: bytes) -> bool:
    return _PEM_MARK in data and 0 not in data


def _is_certificate(data: bytes) -> bool:
    return _signed_object(data) is Form.CERTIFICATE


def _is_crl(data: bytes) -> bool:
    return _signed_object(data) is Form.CRL


def _signed_object(data: bytes) -> Form | None:
    """Certificate and CRL are SEQUENCEs of three; what is signed begins alike, then tells them apart.

    RFC 5280: in a CRL a time follows the issuer's name, in a certificate the SEQUENCE `validity`.
    """
    try:
        outer = Der(der.unwrap(data, der.SEQUENCE, "DER"), "DER")
        tbs = outer.inside(der.SEQUENCE, "tbs")
        outer.raw(der.SEQUENCE, "signatureAlgorithm")
        outer.raw(der.BIT_STRING, "signature")
        outer.end()
        if tbs.peek() == der.explicit(0):
            tbs.raw(der.explicit(0), "version")
        if tbs.peek() == der.INTEGER:
            tbs.raw(der.INTEGER, "version or serialNumber")
        tbs.raw(der.SEQUENCE, "signature")
        tbs.raw(der.SEQUENCE, "issuer")
    except LayoutError:
        return None
    return Form.CERTIFICATE if tbs.peek() == der.SEQUENCE else Form.CRL if tbs.peek() in _TIMES else None


def _is_table(data: bytes) -> bool:
    return begins_with_known_guid(data)


def _parses_as_table(data: bytes) -> bool:
    """Well-formed, and of a size that says nothing else; an empty table has padding of zeros alone."""
    if _has_size_of_report(data):
        return False
    try:
        return bool(parse(data)) or not any(data)
    except LayoutError:
        return False


def _is_report_text(data: bytes) -> bool:
    return _unhex(data) is not None


def _unhex(data: bytes) -> bytes | None:
    """The report, MSG_REPORT_RSP or HCL envelope that a hexadecimal text spells."""
    if data.strip(_HEX_DIGITS):
        return None
    try:
        raw = binascii.unhexlify(b"".join(data.split()))
    except binascii.Error:
        return None
    marks = (_is_report, _is_response, _is_hcl, _has_size_of_report)
    return raw if any(has_mark(raw) for has_mark in marks) else None


_STRONG: Final = (
    (Form.REPORT, _is_report),
    (Form.RESPONSE, _is_response),
    (Form.HCL, _is_hcl),
    (Form.CERTIFICATE, _is_certificate),
    (Form.CRL, _is_crl),
    (Form.PEM, _is_pem),
    (Form.TABLE, _is_table),
    (Form.REPORT_TEXT, _is_report_text),
)
_WEAK: Final = (
    (Form.REPORT, _has_size_of_report),
    (Form.RESPONSE, _is_refusal),
    (Form.TABLE, _parses_as_table),
)


def _report(data: bytes) -> Classified:
    return Classified(form=Form.REPORT, report=bytes(data))


def _response(data: bytes) -> Classified:
    return Classified(form=Form.RESPONSE, report=report_from_response(data))


def _hcl(data: bytes) -> Classified:
    return Classified(form=Form.HCL, report=report_from_hcl(data))


def report_from_response(payload: bytes) -> bytes:
    """The report in the payload of MSG_REPORT_RSP, as the guest driver hands it out.

    Args:
        payload: 20h bytes of header, the report, and whatever the buffer has left.

    Raises:
        LayoutError: a status, another size than a report's, or fewer bytes than that.
    """
    header = MsgReportRspHeader.parse_at(payload, 0)
    if header.status or header.report_size != REPORT_SIZE:
        raise LayoutError(
            f"MSG_REPORT_RSP: status {header.status:#x}, report_size {header.report_size}, "
            f"wanted 0 and {REPORT_SIZE} (AMD 56860)"
        )
    return _cut(payload, MsgReportRspHeader.SIZE, "MSG_REPORT_RSP")


def report_from_hcl(blob: bytes) -> bytes:
    """The report in the HCL envelope of a confidential VM on Azure.

    Its REPORT_DATA is the hash of runtime data in the same envelope: comparing that is the caller's.

    Raises:
        LayoutError: no HCL envelope, or one that is cut off.
    """
    if blob[:4] != _HCL_MAGIC:
        raise LayoutError(f"HCL envelope: begins with {blob[:4]!r}, wanted {_HCL_MAGIC!r}")
    return _cut(blob, _HCL_HEADER, "HCL envelope")


def _cut(data: bytes, start: int, where: str) -> bytes:
    report = bytes(data[start : start + REPORT_SIZE])
    if len(report) != REPORT_SIZE:
        raise LayoutError(f"{where}: {len(report)} bytes after its header, wanted {REPORT_SIZE}")
    return report


def _pem(data: bytes) -> Classified:
    certificates = to_der(data) if _PEM_CERTIFICATE in data or _PEM_CRL not in data else ()
    crls = to_der(data, label=b"X509 CRL") if _PEM_CRL in data else ()
    return Classified(form=Form.PEM, certificates=certificates, crls=crls)


def _report_text(data: bytes) -> Classified:
    raw = _unhex(data) or b""
    inner = _response if _is_response(raw) else _hcl if _is_hcl(raw) else _report
    return Classified(form=Form.REPORT_TEXT, report=inner(raw).report)


_CONTENT: Final[dict[Form, Callable[[bytes], Classified]]] = {
    Form.REPORT: _report,
    Form.RESPONSE: _response,
    Form.HCL: _hcl,
    Form.CERTIFICATE: lambda data: Classified(form=Form.CERTIFICATE, certificates=(bytes(data),)),
    Form.CRL: lambda data: Classified(form=Form.CRL, crls=(bytes(data),)),
    Form.PEM: _pem,
    Form.TABLE: lambda data: Classified(form=Form.TABLE, table=bytes(data)),
    Form.REPORT_TEXT: _report_text,
}
