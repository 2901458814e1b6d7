"""-hf with a small hub on the loopback; the chosen files are those that llama.cpp downloads."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.random_model import make_random_model
from helpers.running import EngineTool
from helpers.small_hub import COMMIT, SmallHub, small_hub

import imatrix
from imatrix import cli
from imatrix.model.hub import HubModel, best_mtp

QUANTS = [
    "README.md",
    "imatrix-Q4_K_M.gguf",
    "mmproj-Q4_K_M.gguf",
    "model-BF16/model-BF16-00001-of-00002.gguf",
    "model-BF16/model-BF16-00002-of-00002.gguf",
    "model-F16.gguf",
    "model-IQ2_XXS.gguf",
    "model-Q4_K_M.gguf",
    "model-Q8_0.gguf",
    "mtp-model-Q8_0.gguf",
]
# these repositories differ in what -hf finds in them
LISTS = {
    "all": QUANTS,
    "no-Q4": [name for name in QUANTS if "Q4_K_M" not in name],
    "no-default": ["a-Q5_K_S.gguf", "b-F16.gguf", "mtp-a.gguf"],
    "split-first": ["x-Q6_K-00001-of-00002.gguf", "x-Q6_K-00002-of-00002.gguf"],
    "dots": ["m.Q4_K_M.gguf", "m.q3_k_l.gguf"],
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallHub]:
    with small_hub() as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / "cache"))
        for name in ("MODEL_ENDPOINT", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield made


def content(name: str) -> bytes:
    return f"content of {name}".encode()


@pytest.mark.parametrize(
    ("names", "quants"),
    [
        ("all", ["", "Q8_0", "bf16", "F16", "iq2_xxs", "Q3_K"]),
        ("no-Q4", [""]),
        ("no-default", ["", "F16"]),
        ("split-first", [""]),
        ("dots", ["", "Q3_K_L"]),
    ],
)
def test_what_llama_cpp_downloads(
    hub: SmallHub,
    engine_tool: EngineTool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    names: str,
    quants: list[str],
) -> None:
    hub.repositories["user/model"] = {name: content(name) for name in LISTS[names]}
    for quant in quants:
        name = "user/model" + (f":{quant}" if quant else "")
        hub.downloads.clear()
        # none of the files is a model: the command fails after they were downloaded
        subprocess.run(
            [engine_tool("llama-imatrix"), "-hf", name, "-f", __file__, "--no-ppl"],
            env={**os.environ, "LLAMA_CACHE": str(tmp_path / f"theirs{quant}")},
            capture_output=True,
            timeout=120,
            check=False,
        )
        theirs = sorted(set(hub.downloads))
        monkeypatch.setenv("LLAMA_CACHE", str(tmp_path / f"ours{quant}"))
        hub.downloads.clear()
        if not theirs:
            with pytest.raises(
                ValueError, match=f"user/model has no GGUF model of {quant}; it has"
            ):
                HubModel(name).model()
            continue
        path = HubModel(name).model()
        assert sorted(hub.downloads) == theirs, name
        assert path.read_bytes() == content(theirs[0])


def test_one_cache_for_both(hub: SmallHub, engine_tool: EngineTool) -> None:
    """The one does not download again what the other has downloaded."""
    hub.repositories["user/model"] = {"a-Q4_K_M.gguf": content("a"), "a-F16.gguf": content("b")}
    command = [engine_tool("llama-imatrix"), "-f", __file__, "--no-ppl", "-hf"]
    HubModel("user/model").model()
    assert hub.downloads == ["a-Q4_K_M.gguf"]
    subprocess.run([*command, "user/model"], capture_output=True, timeout=120, check=False)
    assert hub.downloads == ["a-Q4_K_M.gguf"]
    subprocess.run([*command, "user/model:F16"], capture_output=True, timeout=120, check=False)
    path = HubModel("user/model:F16").model()
    assert hub.downloads == ["a-Q4_K_M.gguf", "a-F16.gguf"]
    assert path.read_bytes() == content("b")


@pytest.mark.parametrize(
    ("files", "model", "quant", "expected"),
    [
        # llama-imatrix has no flag for the head, so these are worked out from the rule
        # (find_best_sibling in common/download.cpp): the deepest shared folder, ...
        (["mtp-m-Q4_0.gguf", "sub/mtp-m-F16.gguf"], "sub/m-Q4_0.gguf", "Q4_0", 1),
        (["other/mtp-m-Q4_0.gguf"], "sub/m-Q4_0.gguf", "Q4_0", None),
        # ... the same quant, ...
        (["mtp-m-Q4_0.gguf", "mtp-m-Q4_K_M.gguf"], "m-Q4_K_M.gguf", "q4_k_m", 1),
        # ... the nearest number of bits to that of the quant, or of the model if none was given,
        # ...
        (["mtp-m-F16.gguf", "mtp-m-Q8_0.gguf"], "m-IQ2_XXS.gguf", "IQ2_XXS", 1),
        (["mtp-m-Q2_K.gguf", "mtp-m-BF16.gguf"], "m-F16.gguf", "", 1),
        # ... and the first of several
        (["mtp-m-Q4_0.gguf", "mtp-m-Q4_1.gguf"], "m-Q4_K_M.gguf", "", 0),
        (["m-Q4_0.gguf", "mmproj-m.gguf"], "m-Q4_0.gguf", "", None),
    ],
)
def test_the_head_beside_a_model(
    files: list[str], model: str, quant: str, expected: int | None
) -> None:
    found = best_mtp([*files, model], model, quant)
    assert found == (None if expected is None else files[expected])


def test_what_goes_wrong(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories |= {
        "user/private": {"m-F16.gguf": b"m"},
        "user/gated": {"m-F16.gguf": b"m"},
        "user/preset": {"preset.ini": b""},
        "user/empty": {"README.md": b""},
    }
    hub.private.add("user/private")
    hub.gated.add("user/gated")
    with pytest.raises(ValueError, match=r"expected USER/MODEL or USER/MODEL:QUANT"):
        HubModel("model")
    with pytest.raises(ValueError, match=r"has no model user/none, or it is private and no token"):
        HubModel("user/none")
    with pytest.raises(ValueError, match=r"or it is private and no token was given"):
        HubModel("user/private")
    with pytest.raises(ValueError, match=r"it is private and the token given was not enough"):
        HubModel("user/private", token="hf_" + "b" * 34)
    with pytest.raises(PermissionError, match=r"user/gated is gated, .*accept its terms at http"):
        HubModel("user/gated").model()
    with pytest.raises(ValueError, match=r"holds a preset \(preset\.ini\), not a model"):
        HubModel("user/preset")
    with pytest.raises(ValueError, match=r"user/empty has no GGUF model; it has no \.gguf file"):
        HubModel("user/empty").model()
    with pytest.raises(ValueError, match=r"has no file 'x\.gguf'; it has m-F16\.gguf"):
        HubModel("user/gated").model("x.gguf")
    # the token comes from the environment
    assert hub.token not in hub.tokens
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert HubModel("user/private").model().read_bytes() == b"m"
    assert HubModel("user/gated").model().read_bytes() == b"m"
    hub.down = True
    with pytest.raises(OSError, match=r"user/empty: .* answers HTTP 503"):
        HubModel("user/empty")


def test_without_the_hub(hub: SmallHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["user/model"] = {"a-Q8_0.gguf": content("a"), "b-F16.gguf": content("b")}
    with pytest.raises(OSError, match=r"user/model is not in the cache .*run once without --off"):
        HubModel("user/model", offline=True)
    HubModel("user/model").model()
    hub.down = True
    asked = len(hub.downloads)
    for offline in (False, True):
        found = HubModel("user/model", offline=offline)
        assert (found.commit, found.files) == (COMMIT, ["a-Q8_0.gguf"])
        assert found.offline
        assert found.model().read_bytes() == content("a")
    assert len(hub.downloads) == asked
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MODEL_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        assert HubModel("user/model").model().read_bytes() == content("a")
        with pytest.raises(OSError, match=r"user/other: http://127\.0\.0\.1:\d+ cannot be reached"):
            HubModel("user/other")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'imatrix\[hub\]'"):
        HubModel("user/model")


def test_the_command(hub: SmallHub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = tmp_path / "whole.gguf"
    make_random_model(whole)
    parts = imatrix.extract_mtp(whole, tmp_path / "mtp-demo.gguf", trunk_out=tmp_path / "t.gguf")
    assert parts.trunk is not None
    hub.repositories["user/whole"] = {
        "demo-F16.gguf": whole.read_bytes(),
        "mtp-demo.gguf": b"not needed",
    }
    hub.repositories["user/split"] = {
        "demo-F16.gguf": Path(parts.trunk).read_bytes(),
        "mtp-demo.gguf": Path(parts.head).read_bytes(),
    }

    def run(*argv: object) -> tuple[int, str]:
        capfd.readouterr()
        common = ["collect", "-c", "32", "-b", "32", "-t", "1", "--no-ppl", "-p", "a word " * 60]
        status = cli.main([*common, *(str(each) for each in argv)])
        return status, capfd.readouterr().err

    outs = [tmp_path / f"{n}.gguf" for n in range(3)]
    assert run("-m", whole, "--mtp", "-o", outs[0])[0] == 0
    status, err = run("-hf", "user/whole", "--mtp", "-o", outs[1])
    assert (status, "user/whole: demo-F16.gguf" in err) == (0, True), err
    # the model holds the head, so that the file beside it is left alone
    assert hub.downloads == ["demo-F16.gguf"]
    status, err = run("-hf", "user/split:f16", "--mtp", "-o", outs[2])
    assert (status, "user/split: mtp-demo.gguf, its head" in err) == (0, True), err
    matrices = [imatrix.ImportanceMatrix.load(out) for out in outs]
    assert matrices[0].head
    assert dict(matrices[0]) == dict(matrices[1]) == dict(matrices[2])
    for argv, told in (
        (["-hf", "user/whole", "-m", whole], "-m and -hf both name a model"),
        (["-hff", "x.gguf", "-m", whole], "give it with -hf"),
        (["-hf", "user/whole:Q2_K"], "user/whole has no GGUF model of Q2_K; it has demo-F16.gguf"),
        (["-hf", "user/none"], "or it is private and no token was given"),
    ):
        status, err = run("-o", tmp_path / "no.gguf", *argv)
        assert (status, told in err) == (2, True), err


def test_wherever_a_model_is_given(
    hub: SmallHub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """-hf, or hf: instead of a path, gives the same as the downloaded file."""
    whole = tmp_path / "whole.gguf"
    make_random_model(whole)
    parts = imatrix.extract_mtp(whole, tmp_path / "mtp-demo.gguf", trunk_out=tmp_path / "t.gguf")
    trunk, head = Path(str(parts.trunk)), Path(parts.head)
    hub.repositories["user/whole"] = {"demo-F16.gguf": whole.read_bytes()}
    hub.repositories["user/split"] = {
        "demo-F16.gguf": trunk.read_bytes(),
        "demo-Q8_0.gguf": b"no model",
        "mtp-demo.gguf": head.read_bytes(),
    }
    text = tmp_path / "text.txt"
    text.write_text("a word and another " * 40)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*argv: object) -> tuple[int, str, str]:
        capfd.readouterr()
        status = cli.main([str(each) for each in argv])
        out, err = capfd.readouterr()
        return status, out, err

    # check: the exit status says that the type needs data
    for argv in (["check", whole], ["check", "-hf", "user/whole"], ["check", "hf:user/whole"]):
        status, out, err = run(*argv, "--type", "IQ2_XXS", "--json")
        assert status == 1, err
        found = json.loads(out)
        assert found["failing"]
        assert found["model"].endswith("demo-F16.gguf" if argv[1] != whole else "whole.gguf")
    assert hub.downloads == ["demo-F16.gguf"]
    # the argument left after -hf took the model's place is the matrix, wherever it stands
    for argv in (["-hf", "user/whole", "no.gguf"], ["no.gguf", "-hf", "user/whole"]):
        assert "no.gguf: No such file" in run("check", *argv, "--type", "Q8_0")[2]
        assert "no.gguf: No such file" in run("check", "--type", "Q8_0", *argv)[2]

    # quantize: the same bytes; the flag may stand anywhere
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    assert run("quantize", whole, first, "Q8_0")[0] == 0
    status, _, err = run("quantize", second, "Q8_0", "--hf-repo=user/whole:F16")
    assert status == 0, err
    assert first.read_bytes() == second.read_bytes()

    # evaluate: the head is in a file beside the model, that of the reference in its own file
    options = ["-f", text, "-c", "32", "-t", "1", "--json"]
    status, out, err = run("evaluate", trunk, "--mtp-model", head, "--reference", whole, *options)
    assert status == 0, err
    status, named, err = run(
        "evaluate", "-hf", "user/split", "-hff", "demo-F16.gguf",
        "--reference", "hf:user/whole", *options,
    )  # fmt: skip
    assert status == 0, err
    assert "user/split: mtp-demo.gguf, its head" in err
    figures, want = json.loads(named), json.loads(out)
    assert figures["head"] is not None
    assert {key: figures[key] for key in ("trunk", "head")} == {
        key: want[key] for key in ("trunk", "head")
    }

    # extract-mtp: the output does not go into the cache
    status, _, err = run("extract-mtp", "-hf", "user/whole")
    assert status == 0, err
    (made,) = (tmp_path / "here").iterdir()
    assert made.read_bytes() == head.read_bytes()
    # graft-mtp: both files come from the hub
    status, _, err = run("graft-mtp", "hf:user/split:F16", head, "-o", tmp_path / "again.gguf")
    assert status == 0, err
    assert imatrix.ModelFile.read(tmp_path / "again.gguf").n_nextn == 1

    for argv, told in (
        (["check", "-hf", "user/none", "--type", "Q8_0"], "or it is private and no token"),
        (["check", whole, "-hff", "x.gguf", "--type", "Q8_0"], "give it with -hf"),
        (["check", "--type", "Q8_0", "-hf"], "expected one argument"),
        (["check", "-hf", "user/whole", "--type", "Q8_0", "a", "b"], "unrecognized arguments: b"),
    ):
        status, _, err = run(*argv)
        assert (status, told in err) == (2, True), err
