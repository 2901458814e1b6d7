"""The recipe on the page of `imatrix report`: its bytes are counted anew from the JSON file, and with
llama.cpp's sizes of blocks."""

from __future__ import annotations

import base64
import json
import xml.etree.ElementTree as ET
from collections import defaultdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from helpers.recipes import BITS, BLOCKS, recipe_data
from tinyhtml5.parser import HTMLParser

import imatrix
from imatrix import Entry, ImportanceMatrix, report_page
from imatrix.cli.program import main
from imatrix.model.header import ModelFile
from imatrix.quantization.recipe import Recipe

MODEL = Path(imatrix.__file__).parent / "data" / "tiny-glm4moe-mtp.gguf"
HOSTILE = "<script>alert(1)</script>"
Tree = ET.Element


def parsed(page: str) -> Tree:
    parser = HTMLParser(namespace_html_elements=False)
    tree = parser.parse(page)
    assert not parser.errors
    return tree


def text_of(element: Tree) -> str:
    return " ".join("".join(element.itertext()).split())


def section(tree: Tree) -> Tree:
    (found,) = [each for each in tree.iter("section") if each.get("aria-labelledby") == "recipe"]
    return found


def facts(tree: Tree) -> dict[str, str]:
    (found,) = [each for each in section(tree).iter("dl") if each.get("class") == "facts"]
    return {text_of(each.find("dt")): text_of(each.find("dd")) for each in found}


def kinds(tree: Tree) -> dict[tuple[str, str], dict[str, str]]:
    """The cells of the table by kind and part, then by heading; those that are empty left out."""
    (table,) = section(tree).iter("table")
    headings = [text_of(cell) for cell in table.find("thead/tr")]
    found = {}
    for row in table.find("tbody"):
        kind, part, *cells = map(text_of, row)
        found[kind, part] = {
            heading: cell for heading, cell in zip(headings[2:], cells, strict=True) if cell
        }
    return found


def in_words(n_bytes: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        power = 1024 ** ("B", "KiB", "MiB").index(unit)
        if n_bytes < 1024 * power:
            return f"{n_bytes} B" if power == 1 else f"{n_bytes / power:.1f} {unit}"
    raise AssertionError(n_bytes)


def matrix(*names: str) -> ImportanceMatrix:
    return ImportanceMatrix({name: Entry(np.ones((1, 256)), [50]) for name in names})


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_data()))
    return path


def counted(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, int]]:
    """(kind, part) -> bytes by type, with "tensors" and "all"; counted from the file."""
    found: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for name, (source, shape) in data["source"].items():
        kind = data["types"].get(name, source)
        values, n_bytes = BLOCKS[kind]
        n = int(np.prod(shape)) // values * n_bytes
        items = name.removesuffix(".weight").split(".")
        if items[0] == "blk":
            part = "head" if int(items[1]) in data["head_blocks"] else "trunk"
            place = (".".join(items[2:]), part)
        else:
            place = (".".join(items), "no block")
        if kind == "f32":
            place = ("norms, biases and others that stay F32", "")
        for row in (place, ("all", "")):
            found[row][kind.upper()] += n
            found[row]["all"] += n
            found[row]["tensors"] += 1
    return found


def test_the_table_has_the_bytes_of_the_file(small: Path) -> None:
    data = recipe_data()
    tree = parsed(report_page(matrix("blk.0.attn_q.weight"), recipe=small, pictures=False))
    expected = {
        place: {
            key: str(n) if key == "tensors" else in_words(n) for key, n in sums.items()
        }
        for place, sums in counted(data).items()
    }  # fmt: skip
    assert kinds(tree) == expected
    # the fewest bits first
    (table,) = section(tree).iter("table")
    types = [text_of(cell).lower() for cell in table.find("thead/tr")][4:]
    assert types == sorted(types, key=lambda kind: (BITS[kind], kind))


def test_what_the_recipe_is(small: Path) -> None:
    page = report_page(matrix("blk.0.attn_q.weight"), recipe=small, pictures=False)
    found = facts(parsed(page))
    assert found["Model"] == "small-F16.gguf glm4moe"
    assert found["Size"] == "2.9 MiB 3,000,000 bytes, the whole file"
    assert found["Bits a weight"] == "3.88"
    # 1.96 standard errors of 0.02
    assert found["KL divergence, measured"] == "0.3 nats a token ± 0.039 (95 %), 3,060 positions"
    assert found["KL divergence, predicted"].startswith("0.25 nats a token")
    assert found["Measured on"] == "held-out.txt 12 chunks of 512 tokens"
    assert found["Head"].startswith("not chosen for")
    (verdict,) = [
        text_of(each) for each in parsed(page).iter("li") if "recipe.json" in text_of(each)
    ]
    assert verdict == (
        "i recipe recipe.json: 2.9 MiB, 3.88 bits a weight, KL 0.3 nats a token measured."
    )


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (
            {"label": "Q4_K", "bytes": 1024**2, "accepted": 1.25, "accepted_low": 1.2,
             "accepted_high": 1.3, "depth": 3, "speed_up": 1.7},
            {"Head": "Q4_K 1.0 MiB", "Accepted a draft": "1.250 of 3 drafted; 1.200 to 1.300 (95 %)",
             "Speed-up of decoding": "1.70 expected"},
        ),
        (
            {"label": "dropped", "bytes": 0, "accepted": None, "accepted_low": None,
             "accepted_high": None, "depth": 0, "speed_up": None},
            {"Head": "dropped"},
        ),
    ],
)  # fmt: skip
def test_the_head(tmp_path: Path, head: dict[str, Any], expected: dict[str, str]) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe_data(head=head)))
    found = facts(parsed(report_page(matrix("output_norm.weight"), recipe=path, pictures=False)))
    last = {key: value for key, value in found.items() if key in (*expected, "Accepted a draft")}
    assert last.keys() == expected.keys()
    assert all(last[key].startswith(value) for key, value in expected.items())


def test_both_pictures(small: Path) -> None:
    tree = parsed(report_page(matrix("blk.0.attn_q.weight"), recipe=small))
    images = [each.get("src") for each in section(tree).iter("img")]
    titles = []
    for address in images:
        start, _, code = address.partition(",")
        assert start == "data:image/svg+xml;base64"
        titles.append(ET.fromstring(base64.b64decode(code))[0].text)
    assert titles == ["KL divergence by size", "Types by block and kind"]
    # without a frontier there is one
    data = recipe_data(frontier=None)
    small.write_text(json.dumps(data))
    page = report_page(matrix("blk.0.attn_q.weight"), recipe=small)
    assert len([*section(parsed(page)).iter("img")]) == 1


def test_the_parts_of_the_page_are_linked(small: Path) -> None:
    page = report_page(matrix("blk.0.attn_q.weight"), recipe=Recipe.load(small), pictures=False)
    tree = parsed(page)
    assert "#recipe" in [each.get("href") for each in tree.iter("a")]
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert len(ids) == len(set(ids))
    without = parsed(report_page(matrix("blk.0.attn_q.weight"), pictures=False))
    assert "recipe" not in [each.get("id") for each in without.iter()]


def test_names_from_strangers(tmp_path: Path) -> None:
    source = {f"blk.0.{HOSTILE}\u202e.weight": ("f16", (256, 4)), "blk.0.a": ("f32", (4,))}
    data = recipe_data(source, head_blocks=[], model=HOSTILE, text=HOSTILE, architecture=HOSTILE)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    page = report_page(matrix("blk.0.a"), recipe=path)
    assert HOSTILE not in page
    assert "\u202e" not in page
    (script,) = parsed(page).iter("script")  # our own, and no other
    assert HOSTILE not in str(script.text)
    assert facts(parsed(page))["Model"] == f"{HOSTILE} {HOSTILE}"


def of_model(path: Path) -> Recipe:
    """A recipe for the model in a file: all at Q4_K."""
    reader = gguf.GGUFReader(path)
    types = {
        tensor.name: "q4_k"
        for tensor in reader.tensors
        if tensor.tensor_type.name == "F16" and tensor.shape[0] % 256 == 0
    }
    return Recipe.for_model(ModelFile.read(path), types, ftype="Q4_K_M", bytes=3_000_000)


def test_with_its_model(tmp_path: Path) -> None:
    found = of_model(MODEL)
    found.save(tmp_path / "recipe.json")
    name = "blk.0.attn_q.weight"
    out = tmp_path / "report.html"
    matrix(name).save(tmp_path / "imatrix.gguf")
    command = ["report", str(tmp_path / "imatrix.gguf"), "-m", str(MODEL), "--type", "Q4_K_M",
               "--no-pictures", "--recipe", str(tmp_path / "recipe.json"), "-o", str(out)]  # fmt: skip
    assert main(command) == 0
    cells = kinds(parsed(out.read_text("utf-8")))
    expected = sum(
        int(tensor.n_elements) * 144 // 256
        for tensor in gguf.GGUFReader(MODEL).tensors
        if tensor.name in found.types
    )
    assert cells["all", ""]["Q4_K"] == in_words(expected)


def test_a_recipe_for_another_model(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model at hand every tensor is compared; with the matrix alone a recipe that has none
    of its weights is refused."""
    out = tmp_path / "report.html"
    matrix("blk.0.attn_q.weight").save(tmp_path / "imatrix.gguf")
    given = ["report", str(tmp_path / "imatrix.gguf"), "--recipe", str(small), "-o", str(out),
             "--no-pictures"]  # fmt: skip
    assert main([*given, "-m", str(MODEL)]) == 2
    error = capsys.readouterr().err
    assert "small-F16.gguf" in error
    assert "another model" in error
    assert main(given) == 0
    out.unlink()
    capsys.readouterr()
    matrix("blk.7.other.weight").save(tmp_path / "imatrix.gguf")
    assert main(given) == 2
    error = capsys.readouterr().err
    n = len(recipe_data()["source"])
    assert f"recipe.json is for another model than imatrix.gguf: of the {n} tensors" in error
    assert not out.exists()


@pytest.mark.parametrize("content", ["{}", "x", '{"format": "imatrix-recipe", "version": 99}'])
def test_a_file_that_is_no_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path, out = tmp_path / "other.json", tmp_path / "report.html"
    path.write_text(content)
    matrix("blk.0.attn_q.weight").save(tmp_path / "imatrix.gguf")
    given = [str(tmp_path / "imatrix.gguf"), "--recipe", str(path), "-o", str(out)]
    assert main(["report", *given]) == 2
    assert "other.json" in capsys.readouterr().err
    assert not out.exists()


def test_the_recipe_is_not_written_over(
    tmp_path: Path, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = small.read_bytes()
    matrix("blk.0.attn_q.weight").save(tmp_path / "imatrix.gguf")
    given = [str(tmp_path / "imatrix.gguf"), "--recipe", str(small), "-o", str(small)]
    assert main(["report", *given]) == 2
    assert "recipe.json" in capsys.readouterr().err
    assert small.read_bytes() == before
