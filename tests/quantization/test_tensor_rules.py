"""Exceptions to a file type, compared with llama-quantize if that program follows them."""

from __future__ import annotations

import json
import logging
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from helpers.running import EngineTool, Forged

from imatrix import Coverage, RuleUse, cli, coverage, quantize
from imatrix.quantization.rules import read_rules

Tensors = dict[str, tuple[str, bytes]]


def tensors_of(path: Path) -> Tensors:
    return {t.name: (t.tensor_type.name, t.data.tobytes()) for t in GGUFReader(path).tensors}


def types_of(found: Coverage) -> dict[str, str]:
    return {tensor.name: tensor.target_type.upper() for tensor in found.tensors}


def file_type(path: Path) -> int:
    return int(GGUFReader(path).fields["general.file_type"].contents())


@pytest.fixture
def theirs(model: Path, engine_tool: EngineTool, tmp_path: Path) -> Any:
    def run(ftype: str, *flags: object, source: Path = model) -> Tensors:
        out = tmp_path / "theirs.gguf"
        command = [engine_tool("llama-quantize"), *map(str, flags), source, out, ftype, "1"]
        subprocess.run(command, check=True, capture_output=True)
        return tensors_of(out)

    return run


def flags_of(rules: list[tuple[str, str]]) -> list[str]:
    return [word for pattern, kind in rules for word in ("--tensor-type", f"{pattern}={kind}")]


def command(*argv: object) -> int:
    return cli.main([str(word) for word in argv])


# --- exceptions that the engine ignores ----------------------------------------------------------


@pytest.mark.parametrize(("ftype", "number"), [("F32", 0), ("F16", 1), ("BF16", 32)])
def test_a_float_type_with_exceptions(
    ftype: str, number: int, model: Path, theirs: Any, tmp_path: Path
) -> None:
    """llama-quantize ignores them for these types (llama_tensor_get_type): the tensors that they
    name are compared with its Q8_0 and Q4_0, all others with its file of the type."""
    rules = [("attn_k.weight", "q8_0"), (r"blk\.1\.ffn", "q4_0"), ("attn_", "q8_0")]
    plain = theirs(ftype)
    assert theirs(ftype, *flags_of(rules)) == plain  # this makes up for the defect
    q8_0, q4_0 = theirs("Q8_0", "--pure"), theirs("Q4_0", "--pure")

    ours = tmp_path / "ours.gguf"
    quantize(model, ours, ftype, tensor_types=rules)

    def expected(name: str) -> tuple[str, bytes]:
        if "attn_" in name:
            return q8_0[name]
        return q4_0[name] if name.startswith("blk.1.ffn") else plain[name]

    found = tensors_of(ours)
    assert found == {name: expected(name) for name in plain}
    # norms keep their type whatever a rule says, in llama-quantize's files too
    assert found["blk.1.attn_norm.weight"][0] == "F32"
    assert {kind for kind, _ in found.values()} >= {"Q8_0", "Q4_0", ftype}
    assert file_type(ours) == number
    check = coverage(model, None, ftype, tensor_types=rules)
    assert types_of(check) == {name: kind for name, (kind, _) in found.items()}
    assert check.warnings == ()


@pytest.mark.slow
def test_a_float_type_whose_exceptions_need_data(
    model: Path, head_matrix: Path, theirs: Any, tmp_path: Path
) -> None:
    rules = [("attn_q.weight", "iq2_xs"), ("ffn_gate_exps", "iq3_xxs")]
    quantize(model, tmp_path / "q.gguf", "BF16", imatrix=head_matrix, tensor_types=rules)
    # what llama-quantize makes from the same request in a form that it follows
    flags = ["--imatrix", head_matrix, *flags_of([*rules, (".", "bf16")])]
    assert tensors_of(tmp_path / "q.gguf") == theirs("Q8_0", *flags)
    found = coverage(model, None, "BF16", tensor_types=rules)
    assert {t.target_type for t in found.missing} == {"iq2_xs", "iq3_xxs"}
    with pytest.raises(RuntimeError, match="requires an imatrix"):
        quantize(model, tmp_path / "none.gguf", "BF16", tensor_types=rules)
    assert not (tmp_path / "none.gguf").exists()


def test_pure_and_the_output_left_alone(model: Path, theirs: Any, tmp_path: Path) -> None:
    rules = [("attn_v", "q8_0")]
    quantize(model, tmp_path / "q.gguf", "F32", pure=True, quantize_output=False,
             tensor_types=rules)  # fmt: skip
    plain, q8_0 = theirs("F32", "--leave-output-tensor"), theirs("Q8_0", "--pure")
    assert tensors_of(tmp_path / "q.gguf") == {
        name: q8_0[name] if "attn_v" in name else plain[name] for name in plain
    }
    assert plain["output.weight"][0] == "F16"


def test_a_rule_for_a_float_type_whose_rows_do_not_fit(forged: Forged, tmp_path: Path) -> None:
    """As for a quantized type: the engine's own fallback applies, and is reported."""
    model = forged("llama", n_ff=320, n_layer=2).path
    found = coverage(model, None, "F16", tensor_types={"ffn_down": "q4_k"})
    quantize(model, tmp_path / "q.gguf", "F16", tensor_types={"ffn_down": "q4_k"})
    written = {name: kind for name, (kind, _) in tensors_of(tmp_path / "q.gguf").items()}
    assert written["blk.1.ffn_down.weight"] == "Q5_0"
    assert types_of(found) == written
    assert found.warnings == (
        "the rule ffn_down=q4_K: the rows of 2 of 2 tensors are no multiple of its block; they "
        "get q5_0 (blk.0.ffn_down.weight, blk.1.ffn_down.weight)",
    )
    assert found.rules[0].other_type == dict.fromkeys(found.rules[0].tensors, "q5_0")


# --- the order of exceptions ---------------------------------------------------------------------


@pytest.mark.parametrize("ftype", ["Q4_0", "F16"])
def test_of_two_with_one_pattern_the_first_counts(
    ftype: str, model: Path, theirs: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rules = [("attn_q.weight", "q8_0"), ("attn_q.weight", "q5_0"), ("attn_k", "q5_1")]
    out = tmp_path / "q.gguf"
    with caplog.at_level(logging.WARNING, "imatrix"):
        done = quantize(model, out, ftype, tensor_types=iter(rules))
    found = tensors_of(out)
    if ftype == "Q4_0":
        assert found == theirs(ftype, *flags_of(rules))
    assert found["blk.0.attn_q.weight"][0] == "Q8_0"
    assert found["blk.0.attn_k.weight"][0] == "Q5_1"
    never = (
        "the rule attn_q.weight=q5_0 never counts: an earlier rule (attn_q.weight) matches "
        "whatever it could change"
    )
    assert never in caplog.messages
    assert [use.shadowed for use in done.rules] == [False, True, False]
    assert coverage(model, None, ftype, tensor_types=rules).warnings == (never,)


def test_the_commands_keep_the_order(
    model: Path, theirs: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rules come from flags and files as they are given, one rule twice among them."""
    file = tmp_path / "rules.txt"
    file.write_bytes(b"\xef\xbb\xbfATTN_Q=q5_0 attn_k=q5_1\r\n\n\tattn_v.weight=Q8_0\n")
    unmarked = tmp_path / "unmarked.txt"  # llama-quantize would take the mark for part of a name
    unmarked.write_bytes(file.read_bytes()[3:])
    for flags in (
        [
            "--tensor-type",
            "attn_q=q8_0",
            "--tensor-type-file",
            file,
            "--tensor-type",
            "attn_k=q4_1",
        ],
        ["--tensor-type-file", file, "--tensor-type", "attn_q=q8_0", "--tensor-type", "attn_v=f16"],
        ["--tensor-type", "attn_q=q4_1", "--tensor-type", "attn_q=q8_0"],
    ):
        out = tmp_path / "q.gguf"
        assert command("quantize", model, out, "Q4_0", *flags) == 0
        expected = theirs("Q4_0", *[unmarked if flag == file else flag for flag in flags])
        assert tensors_of(out) == expected
        told = capsys.readouterr().err
        assert "never counts" in told
        assert command("check", model, "--type", "Q4_0", "--json", *flags) == 0
        printed = capsys.readouterr()
        assert "never counts" in printed.err
        found = json.loads(printed.out)
        assert {t["name"]: t["target_type"].upper() for t in found["tensors"]} == {
            name: kind for name, (kind, _) in expected.items()
        }
        assert [use["shadowed"] for use in found["rules"]][-1] or flags[-1] == "attn_v=f16"


def test_what_follows_a_backslash_is_not_lowered(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    r"""llama-quantize would make \D, no digit, into \d, a digit."""
    out = tmp_path / "q.gguf"
    assert command("quantize", model, out, "Q4_0", "--tensor-type", r"ATTN_\D\.WEIGHT=q8_0") == 0
    assert tensors_of(out)["blk.0.attn_q.weight"][0] == "Q8_0"
    assert tensors_of(out)["blk.0.attn_output.weight"][0] == "Q4_0"
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("attn_q=q8_0\nattn_k\n", "2: expected NAME=TYPE, as attn_q=q8_0, got 'attn_k'"),
        ("# attention\nattn_q=q8_0", "1: expected NAME=TYPE, as attn_q=q8_0, got '#'"),
        ("a=q8_0 b=f16\n\nattn_k=q9_0", "3: unknown tensor type 'q9_0' for 'attn_k'; near: q8_0"),
        ("attn_(q=q8_0", "1: a pattern in tensor_types is wrong: Mismatched '(' and ')'"),
        ("(?<=attn)_q=q8_0", "1: a pattern in tensor_types is wrong: "),
        ("=q8_0", "1: expected NAME=TYPE"),
        ("attn_q=", "1: expected NAME=TYPE"),
        ("caf\udce9=q8_0", "1: not UTF-8: b'caf\\xe9=q8_0'"),
        ("a\0b=q8_0", "1: a pattern in tensor_types is wrong: 'a\\x00b' holds a zero byte"),
        (" \n", " no rule in it; expected NAME=TYPE, as attn_q=q8_0"),
    ],
)
def test_a_file_that_is_wrong(
    text: str, message: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "rules.txt", tmp_path / "q.gguf"
    file.write_bytes(text.encode(errors="surrogateescape"))
    assert command("quantize", model, out, "Q4_0", "--tensor-type-file", file) == 2
    assert f"error: {file}:{message}" in capsys.readouterr().err
    assert command("check", model, "--type", "Q4_0", "--tensor-type-file", file) == 2
    assert f"error: {file}:{message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_is_missing_or_the_output(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rules.txt"
    flags = ["--tensor-type-file", file]
    assert command("quantize", model, tmp_path / "q.gguf", "Q4_0", *flags) == 2
    assert f"{file}: No such file or directory" in capsys.readouterr().err
    file.write_text("attn_q=q8_0")
    assert command("quantize", model, file, "Q4_0", *flags) == 2
    assert "would replace the input" in capsys.readouterr().err
    assert file.read_text() == "attn_q=q8_0"
    assert read_rules(file) == [("attn_q", "q8_0")]


# --- exceptions without effect -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "told"),
    [
        ("attn_qq", "matches no tensor of the model; near: attn_q"),
        ("ATTN_K", ": names are matched with their case, and attn_k matches some"),
        (r"blk\.9\.attn_q", ": its blocks are 0 to 3"),
        (r"^output$", "matches no tensor of the model"),
        (r"blk\.0\.ffn_dwn", "near: blk.0.ffn_down"),
        ("experts", "near: ffn_"),
        ("_norm.weight", "does nothing: the quantizer leaves the tensors that it matches as they"),
        ("ffn_gate_inp", "(blk.1.ffn_gate_inp.weight, blk.2.ffn_gate_inp.weight, blk.3.ffn_gate_"),
        (r"\.bias$", "does nothing"),
    ],
)
@pytest.mark.parametrize("ftype", ["Q4_0", "F16"])
def test_one_that_does_nothing_is_warned_of(
    ftype: str, pattern: str, told: str, model: Path, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done = quantize(model, tmp_path / "a.gguf", ftype, tensor_types={pattern: "q5_1"})
    (warning,) = caught
    assert warning.category is UserWarning
    assert warning.filename == __file__
    assert told in str(warning.message)
    assert str(warning.message).startswith(f"the rule {pattern}=q5_1 ")
    assert [type(use) for use in done.rules] == [RuleUse]
    assert done.rules[0].idle
    assert coverage(model, None, ftype, tensor_types={pattern: "q5_1"}).warnings == (
        str(warning.message),
    )
    quantize(model, tmp_path / "b.gguf", ftype)
    assert tensors_of(tmp_path / "a.gguf") == tensors_of(tmp_path / "b.gguf")


def test_the_commands_tell_it(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = ["--tensor-type", "attn_qq=q8_0"]
    warning = "warning: the rule attn_qq=q8_0 matches no tensor of the model; near: attn_q"
    assert command("quantize", model, tmp_path / "q.gguf", "F16", *rule) == 0
    assert warning in capsys.readouterr().err
    assert command("check", model, "--type", "F16", *rule) == 0
    assert warning in capsys.readouterr().err


def test_part_of_what_a_rule_matches_is_never_quantized(model: Path, tmp_path: Path) -> None:
    """The usual rule for a block names its norms too: no warning."""
    found = coverage(model, None, "Q4_0", tensor_types={r"blk\.1\.": "q8_0"})
    assert found.warnings == ()
    assert "blk.1.attn_norm.weight" in found.rules[0].kept
    assert "blk.1.attn_q.weight" not in found.rules[0].kept
    # and a type that the tensor already has is no exception that was ignored
    assert coverage(model, None, "Q4_0", tensor_types={"_norm": "f32"}).rules[0].kept == ()


def test_no_output_to_leave(forged: Forged, tmp_path: Path) -> None:
    model = forged("llama", n_layer=2, tied=True).path
    told = "there is no output.weight to leave as it is: the model's output is token_embd.weight"
    with pytest.warns(UserWarning, match=told):
        quantize(model, tmp_path / "q.gguf", "Q4_0", quantize_output=False)
    with pytest.warns(UserWarning, match="it has no output.weight, its output is token_embd"):
        quantize(model, tmp_path / "q.gguf", "Q4_0", tensor_types={"^output.weight$": "q8_0"})


# --- the expressions -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [
        (r"blk\.(?=1\.)\d\.attn_q\.weight", True),
        ("attn_[[:alpha:]].weight", True),  # POSIX classes, which Python's re has not
        (r"(?:attn)_q\.weight$", True),
        (r"\Aattn", False),  # in std::regex an A
    ],
)
def test_the_dialect_is_the_engines(pattern: str, matches: bool, model: Path) -> None:
    found = coverage(model, None, "Q4_0", tensor_types={pattern: "q8_0"})
    assert (types_of(found)["blk.1.attn_q.weight"] == "Q8_0") == matches
    assert ("blk.1.attn_q.weight" in found.rules[0].tensors) == matches


@pytest.mark.parametrize(
    ("types", "message"),
    [
        ({"(?i)attn": "q8_0"}, r"no look-behind, no flags such as \(\?i\)"),
        ([("(" * 300 + ")" * 300, "q8_0")], "600 characters and 300 groups"),
        ([("attn_q\udcff", "q8_0")], "is not UTF-8"),
        ([("attn_q", 8)], "a pattern and a type as text, got 'attn_q' and 8"),
        ([("attn_q",)], "takes pairs of a pattern and a type"),
        (["ab"], "takes pairs of a pattern and a type, as .* got 'ab'"),
    ],
)
def test_what_is_no_rule(types: Any, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(model, tmp_path / "q.gguf", "Q4_0", tensor_types=types)
    with pytest.raises(ValueError, match=message):
        coverage(model, None, "Q4_0", tensor_types=types)
    assert list(tmp_path.iterdir()) == []
