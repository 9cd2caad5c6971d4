"""Policy files: JSON and TOML give the same policy, what is none is told by key, got and wanted.

Source: docs/policy.md; RFC 8259; TOML 1.0; JSON Schema 2020-12.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from swsnp.abi.snp_report import PlatformInfo, Product
from swsnp.errors import InputError
from swsnp.verify.policy import Policy, entries
from swsnp.verify.policy_file import MAXIMUM_SIZE, policy_schema, read_policy

VALIDATOR = Draft202012Validator(policy_schema())
DIGEST = "aB" * 48

# key, value in the file, value of the policy; a second value that is good, too
GOOD: list[tuple[str, Any, Any]] = [
    ("report_data", "07" * 64, b"\x07" * 64),
    ("measurements", [DIGEST, DIGEST.lower(), "00" * 48], {b"\xab" * 48, bytes(48)}),
    ("host_data", "07" * 32, b"\x07" * 32),
    ("family_id", "07" * 16, b"\x07" * 16),
    ("image_id", "07" * 16, b"\x07" * 16),
    ("report_ids", ["07" * 32], {b"\x07" * 32}),
    ("report_id_ma", "07" * 32, b"\x07" * 32),
    ("vmpl", 0, 0),
    ("maximum_vmpl", 3, 3),
    ("minimum_guest_svn", 4294967295, 4294967295),
    ("id_key_digests", [DIGEST], {b"\xab" * 48}),
    ("require_id_block", True, True),
    ("author_key_digests", [DIGEST], {b"\xab" * 48}),
    ("require_author_key", False, False),
    ("accept_host_report", True, True),
    ("allow_debug", True, True),
    ("allow_migrate_ma", False, False),
    ("minimum_abi", "1.51", (1, 51)),
    ("allow_smt", False, False),
    ("allow_cxl", True, True),
    ("require_single_socket", True, True),
    ("require_mem_aes_256_xts", True, True),
    ("require_rapl_dis", True, True),
    ("require_ciphertext_hiding_dram", True, True),
    ("require_page_swap_disable", True, True),
    ("required_platform_info", ["ecc_en", 5, 63], PlatformInfo(1 << 2 | 1 << 5 | 1 << 63)),
    ("forbidden_platform_info", [0, "smt_en", "tio_en"], PlatformInfo(0x81)),
    ("refuse_unknown_platform_info", True, True),
    ("minimum_tcb", {"Milan": {"snp": 24}, "Turin": {"fmc": 0}}, None),
    ("minimum_launch_tcb", {"Genoa": {"microcode": 255}}, None),
    ("minimum_build", 255, 255),
    ("minimum_version", "255.0", (255, 0)),
    ("require_committed_current", True, True),
    ("launch_mit_vector", 18446744073709551615, (1 << 64) - 1),
    ("current_mit_vector", 0, 0),
    ("chip_ids", ["07" * 64, "07" * 8], {b"\x07" * 64, b"\x07" * 8}),
    ("require_chip_id", True, True),
    ("csp_ids", ["CN=cc-us-east-2.amazonaws.com"], {"CN=cc-us-east-2.amazonaws.com"}),
    ("require_crl", True, True),
    ("maximum_crl_age_s", 0, 0),
    ("allow_expired_leaf", True, True),
]
TCBS: dict[str, Any] = {
    "minimum_tcb": {Product.MILAN: {"snp": 24}, Product.TURIN: {"fmc": 0}},
    "minimum_launch_tcb": {Product.GENOA: {"microcode": 255}},
}
BAD: list[tuple[str, Any, str]] = [
    ("nonsense", 1, "key 'nonsense' is unknown, wanted one of docs/policy.md"),
    ("report_data", "07" * 63, "report_data: got 126 digits, wanted 128 hexadecimal digits"),
    ("report_data", "0x" + "07" * 63, "report_data: got '0x07"),
    ("report_data", "0" * 127, "wanted 128 hexadecimal digits"),
    ("report_data", "", "report_data: got ''"),
    ("report_data", 7, "report_data: got 7, wanted 128"),
    ("measurements", "07" * 48, "measurements: got '07.*…, wanted an array"),
    ("measurements", [], "got an empty array, wanted at least one value"),
    ("measurements", [DIGEST, "07"], r"measurements\[1\]: got 2 digits, wanted 96"),
    ("chip_ids", ["07" * 16], r"chip_ids\[0\]: got 32 digits, wanted 16 or 128 hexadecimal digits"),
    ("vmpl", True, "vmpl: got True, wanted an integer of 0 to 3"),
    ("vmpl", 4, "vmpl: got 4"),
    ("vmpl", 1.5, "vmpl: got 1.5"),
    ("vmpl", "1", "vmpl: got '1'"),
    ("allow_debug", 1, "allow_debug: got 1, wanted true or false"),
    ("allow_smt", "yes", "allow_smt: got 'yes', wanted true or false"),
    ("minimum_abi", "1", 'wanted a text "major.minor"'),
    ("minimum_abi", "1.256", "minimum_abi: got '1.256', wanted major and minor of 0 to 255"),
    ("minimum_abi", "01.2", "wanted a text"),
    ("minimum_abi", [1, 2], "wanted a text"),
    ("required_platform_info", ["ecc"], r"required_platform_info\[0\]: got 'ecc', wanted one of smt_en"),
    ("required_platform_info", [64], r"got 64, wanted .* or a bit number of 0 to 63"),
    ("required_platform_info", [True], "got True"),
    ("required_platform_info", [-1], "got -1"),
    ("required_platform_info", "ecc_en", "wanted an array"),
    ("minimum_tcb", {}, "minimum_tcb: got {}, wanted a table of Milan, Genoa, Turin"),
    ("minimum_tcb", 3, "wanted a table of"),
    ("minimum_tcb", {"milan": {"snp": 1}}, "got 'milan', wanted one of Milan, Genoa, Turin"),
    ("minimum_tcb", {"Milan": {"fmc": 1}}, "minimum_tcb.Milan: got 'fmc', wanted one of boot_loader"),
    ("minimum_tcb", {"Milan": {}}, "minimum_tcb.Milan: got {}"),
    ("minimum_tcb", {"Turin": {"fmc": 256}}, "minimum_tcb.Turin.fmc: got 256, wanted an integer"),
    ("csp_ids", [""], r"csp_ids\[0\]: got '', wanted a text"),
    ("csp_ids", [7], r"csp_ids\[0\]: got 7"),
    ("maximum_crl_age_s", -1, "maximum_crl_age_s: got -1"),
]


def toml(key: str, value: Any) -> str:
    """One key in TOML; JSON's forms of strings, numbers and arrays are TOML's as well."""
    if not isinstance(value, dict):
        return f"{key} = {json.dumps(value)}"
    lines = [
        f"{name}.{part} = {json.dumps(level)}"
        for name, parts in value.items()
        for part, level in parts.items()
    ]
    return "\n".join([f"[{key}]", *lines])


def test_every_key_is_tried() -> None:
    """The list of this file has all keys of the policy."""
    assert [key for key, *_ in GOOD] == [each.name for each in entries()]


@pytest.mark.parametrize(("key", "value", "wanted"), GOOD, ids=[key for key, *_ in GOOD])
def test_json_and_toml_agree(key: str, value: Any, wanted: Any) -> None:
    """Either text gives the policy that the same values give in Python, and the schema takes the JSON."""
    policy = Policy(**{key: TCBS.get(key, wanted)})
    text = json.dumps({key: value})
    assert read_policy(text.encode(), "p.json") == policy
    assert read_policy(f"\ufeff \n{text}\n".encode(), "p.json") == policy
    assert read_policy(toml(key, value).encode(), "p.toml") == policy
    VALIDATOR.validate({key: value})


@pytest.mark.parametrize(("key", "value", "text"), BAD)
def test_what_is_no_policy(key: str, value: Any, text: str) -> None:
    """File, key, got and wanted; and the schema refuses the same."""
    forms = (
        [json.dumps({key: value})] if value == {"Milan": {}} else [json.dumps({key: value}), toml(key, value)]
    )
    for data in forms:
        with pytest.raises(InputError, match=f"^my file: .*{text}"):
            read_policy(data.encode(), "my file")
    assert not VALIDATOR.is_valid({key: value})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\xff\xfe{", "byte 0: invalid start byte, wanted UTF-8 text"),
        (b"{", "wanted a policy in JSON"),
        (b'{"vmpl": 1, "vmpl": 1}', "key 'vmpl' stands twice, wanted a policy in JSON"),
        (b'{"minimum_tcb": {"Milan": {"snp": 1, "snp": 2}}}', "key 'snp' stands twice"),
        (b'{"a":' * 100_000, "wanted a policy in JSON"),
        (b'{"vmpl": ' + b"1" * 10_000 + b"}", "wanted a policy in JSON"),
        (b'{"vmpl": 1} {}', "wanted a policy in JSON"),
        (b"[1]\n[1]", "wanted a policy in TOML"),
        (b"vmpl = 1\nvmpl = 1", "wanted a policy in TOML"),
        (b"vmpl", "wanted a policy in TOML"),
        (b"vmpl = null", "wanted a policy in TOML"),
        (b'{"vmpl": null}', "vmpl: got None, wanted an integer"),
        (b'{"$schema": 1}', "schema: wanted a text"),
        (b"# " + b"x" * MAXIMUM_SIZE, f"got {MAXIMUM_SIZE + 2} bytes, wanted at most {MAXIMUM_SIZE}"),
    ],
    ids=lambda value: value[:24] if isinstance(value, bytes) else "",
)
def test_what_is_no_file(data: bytes, text: str) -> None:
    """Broken text, keys that stand twice, nesting and size without bound: one named error each."""
    with pytest.raises(InputError, match=f"^my file: .*{text}"):
        read_policy(data, "my file")


def test_the_largest_file_is_read() -> None:
    """The limit itself is inside; an empty file is the default policy, in TOML."""
    assert read_policy(b"#" * MAXIMUM_SIZE, "p") == Policy()
    assert read_policy(b"", "p") == Policy()
    assert read_policy(b'{"$schema": "x"}', "p") == Policy()


VALUES = st.one_of(
    st.booleans(),
    st.none(),
    st.integers(-2, 300),
    st.integers(0, 1 << 65),
    st.text("0aF.", max_size=6),
    st.sampled_from(["07" * 16, "07" * 32, DIGEST, "07" * 64, "1.5", "256.0", "ecc_en", "tio_en"]),
    st.lists(
        st.sampled_from(["07" * 8, "07" * 32, DIGEST, "07" * 64, "ecc_en", 7, 64, "", True]), max_size=3
    ),
    st.dictionaries(
        st.sampled_from(["Milan", "Turin", "Rome"]),
        st.dictionaries(st.sampled_from(["snp", "fmc", "tee"]), st.integers(-1, 256), max_size=2),
        max_size=2,
    ),
)


KEYS = st.sampled_from([*(each.name for each in entries()), "$schema", "other"])


def read(data: bytes) -> Policy | None:
    """The policy; None, when it is refused with an error that names the file."""
    try:
        return read_policy(data, "p")
    except InputError as error:
        return None if str(error).startswith("p: ") else Policy(vmpl=3)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=3))
def test_schema_and_reader_agree(values: dict[str, Any]) -> None:
    """JSON Schema, judged by `jsonschema`, takes exactly the files that are policies."""
    assert (read(json.dumps(values).encode()) is not None) is VALIDATOR.is_valid(values)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes(data: bytes) -> None:
    """A policy or InputError, nothing else; hardly any noise is a policy, and then it demands nothing."""
    assert read(data) in (None, Policy())
