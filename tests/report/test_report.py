"""`imatrix report`: the page is valid, stands alone, shows what is in the file, and cannot be
fooled.

tests/browser/check_report.py looks at it in a browser; it is run by hand, see docs/report.md.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import re
import subprocess
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tinyhtml5.parser import HTMLParser

import imatrix
from imatrix import Entry, ImportanceMatrix, LeftOut, Provenance, TextSource, cli, report_page
from imatrix.report.html import plain

DATA = Path(imatrix.__file__).parent / "data"
TEMPLATES = Path(imatrix.__file__).parent / "report" / "templates"
HOSTILE = "<script>alert(1)</script>"
Tree = ET.Element


def parsed(page: str) -> Tree:
    """The page as a browser's parser reads it; errors by the HTML standard fail the test."""
    parser = HTMLParser(namespace_html_elements=False)
    tree = parser.parse(page)
    assert not parser.errors
    return tree


def every(tree: Tree, tag: str) -> list[Tree]:
    return list(tree.iter(tag))


def text_of(element: Tree) -> str:
    """Its text, with runs of blanks made one."""
    return " ".join("".join(element.itertext()).split())


def table(tree: Tree, caption: str) -> list[dict[str, str]]:
    """The rows of the table with that caption, by the heading of each column."""
    for each in tree.iter("table"):
        if text_of(each.find("caption")) == caption:
            headings = [text_of(cell) for cell in each.find("thead/tr")]
            return [
                dict(zip(headings, map(text_of, row), strict=True)) for row in each.find("tbody")
            ]
    raise AssertionError(f"no table {caption!r}: {[text_of(c) for c in tree.iter('caption')]}")


def facts(tree: Tree) -> dict[str, str]:
    """What the page says about how the matrix was made."""
    (found,) = [each for each in tree.iter("dl") if each.get("class") == "facts"]
    return {text_of(each.find("dt")): text_of(each.find("dd")) for each in found}


def verdicts(tree: Tree) -> list[str]:
    (found,) = [each for each in tree.iter("ul") if each.get("class") == "verdicts"]
    return [text_of(each) for each in found]


@pytest.fixture(scope="module")
def experts() -> ImportanceMatrix:
    """Two blocks of four experts; the second block is the head; the weights have different
    counts."""
    rng = np.random.default_rng(5)
    counts = {0: [0, 5, 31, 4000], 1: [32, 33, 40, 1_000_000]}
    entries = {}
    for block, rows in counts.items():
        for kind, more in (("gate", 0), ("up", 0), ("down", 7)):
            seen = np.array(rows) + more * (np.array(rows) > 0)
            sums = rng.uniform(1, 2, (4, 64)) * seen[:, None]
            entries[f"blk.{block}.ffn_{kind}_exps.weight"] = Entry(sums, seen)
        entries[f"blk.{block}.attn_q.weight"] = Entry(rng.uniform(1, 2, (1, 32)), [9000])
    # over 10 rows: the last channel's mean square is 93.7, its mean -9
    entries["blk.1.nextn.eh_proj.weight"] = Entry(
        [[1.0] * 63 + [937.0]], [10], signed_sums=[[0.0] * 63 + [-90.0]]
    )
    return ImportanceMatrix(
        entries,
        datasets=("a.txt", "b.txt"),
        chunk_count=20,
        chunk_size=512,
        provenance=Provenance(
            collector="imatrix 0.1.0",
            engine="llama.cpp 1.2",
            mtp=True,
            n_ctx=512,
            dataset_digest="ab" * 32,
            left_out=(LeftOut(3, 1536, "blk.0.attn_q.weight"),),
            tokens=10_000,
            packing="document",
            seed=7,
            sources=(
                TextSource("a.txt", documents=4, tokens=2_500, dropped=11, weight=0.25),
                TextSource("b.txt", documents=1_234, tokens=7_500, dropped=0, weight=0.75),
            ),
        ),
    )


@pytest.fixture(scope="module")
def hostile() -> ImportanceMatrix:
    """Names that only somebody with bad intentions would give."""
    ones = np.ones((1, 8))
    names = [
        f"blk.0.{HOSTILE}.weight",
        'blk.1."onload=alert(1).weight',
        "blk.2.ffn_\u202egnp.exe",
        "--></style></title><img src=x onerror=alert(2)>",
        "{{ 7 * 7 }}{% raw %}",
        "\x1b[31mred\x00\uffff\r\n",
        "وزن_الانتباه",
        "x" * 400,
    ]
    return ImportanceMatrix(
        {name: Entry(ones, [40]) for name in names},
        datasets=(HOSTILE,),
        chunk_count=2**31,
        chunk_size=2**31,
        provenance=Provenance(
            collector=HOSTILE,
            engine="'\"><b>",
            packing=HOSTILE,
            dataset_digest='"><b onclick=alert(3)>',
            left_out=(LeftOut(1, 512, HOSTILE),),
            tokens=2**62,
            sources=(
                TextSource(HOSTILE, 1, 5),
                TextSource("نص.txt", 1, 2**61),
                TextSource("", 1, 1),
            ),
        ),
    )


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with matrices of the package's model: with-head, trunk-only, with-head.dat."""
    folder = tmp_path_factory.mktemp("report")
    with imatrix.Collector(DATA / "tiny-glm4moe-mtp.gguf") as collector:
        matrix = collector.run(DATA / "calibration.txt", mtp=True, max_chunks=4)
    matrix.save(folder / "with-head.gguf")
    matrix.save(folder / "with-head.dat", format="dat")
    matrix.trunk.save(folder / "trunk-only.gguf")
    return folder


@pytest.fixture(scope="module")
def pages(experts: ImportanceMatrix, hostile: ImportanceMatrix, shipped: Path) -> dict[str, str]:
    """A page of each kind."""
    model = DATA / "tiny-glm4moe-mtp.gguf"
    with_head = shipped / "with-head.gguf"
    return {
        "whole": report_page(with_head, model=model, against=shipped / "trunk-only.gguf"),
        "experts": report_page(experts, against=experts, pictures=False),
        "hostile": report_page(hostile, name=HOSTILE + "\u202e", against=hostile),
        "failing": report_page(
            shipped / "trunk-only.gguf", model=model, types=["iq2_xxs", "Q4_K_M"], pictures=False
        ),
        "dat": report_page(shipped / "with-head.dat", pictures=False),
        "bare": report_page(ImportanceMatrix({"w": Entry([[0.0, 0.0]], [0])})),
    }


KINDS = ("whole", "experts", "hostile", "failing", "dat", "bare")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_valid_and_well_built(pages: dict[str, str], kind: str) -> None:
    tree = parsed(pages[kind])
    ids = [each.get("id") for each in tree.iter() if each.get("id")]
    assert len(ids) == len(set(ids))
    links = [each.get("href")[1:] for each in tree.iter("a")]
    labels = [each.get("aria-labelledby") for each in tree.iter() if each.get("aria-labelledby")]
    assert {*links, *labels} <= set(ids)
    levels = [int(each.tag[1]) for each in tree.iter() if re.fullmatch("h[1-6]", str(each.tag))]
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))
    assert tree.get("lang") == "en"
    for each in every(tree, "table"):
        assert text_of(each.find("caption"))
        columns = each.findall("thead/tr/th")
        assert all(cell.get("scope") == "col" for cell in columns)
        for row in each.findall("tbody/tr"):
            assert len(row) == len(columns)
            assert (row[0].tag, row[0].get("scope")) == ("th", "row")
    for each in every(tree, "img"):
        assert len(each.get("alt")) > 20
        assert each.get("width")
        assert each.get("height")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_stands_alone_and_its_policy_says_so(pages: dict[str, str], kind: str) -> None:
    tree = parsed(pages[kind])
    for each in tree.iter():
        assert not [key for key in each.attrib if key.startswith("on") or key == "style"]
        for key in ("src", "srcset"):
            assert (each.get(key) or "data:image/svg+xml;base64,").startswith(
                "data:image/svg+xml;base64,"
            )
        assert not set(each.attrib) & {"action", "formaction", "background", "poster", "ping"}
        assert each.tag not in ("link", "iframe", "object", "embed", "form", "base", "svg")
    (policy,) = [
        each.get("content")
        for each in tree.iter("meta")
        if each.get("http-equiv") == "Content-Security-Policy"
    ]
    for tag in ("style", "script"):
        (element,) = every(tree, tag)
        digest = base64.b64encode(hashlib.sha256(element.text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
        assert not re.search(r"https?:|url\(|@import|fetch|innerHTML", element.text)
    assert policy.startswith("default-src 'none';")


def test_pictures_are_svg_for_either_screen_and_either_light(pages: dict[str, str]) -> None:
    tree = parsed(pages["whole"])
    pictures = every(tree, "picture")
    assert len(pictures) == 5  # experts, concentration, channels, layers, against
    for picture in pictures:
        queries = [each.get("media") for each in picture.iter("source")]
        assert queries == [
            "(max-width: 40rem) and (prefers-color-scheme: dark)",
            "(max-width: 40rem)",
            "(prefers-color-scheme: dark)",
        ]
        for each in [*picture.iter("source"), *picture.iter("img")]:
            data = (each.get("srcset") or each.get("src")).partition("base64,")[2]
            svg = ET.fromstring(base64.b64decode(data))
            assert svg.tag == "{http://www.w3.org/2000/svg}svg"
            _, _, width, height = map(float, svg.get("viewBox").split())
            ratio = int(each.get("width")) / int(each.get("height"))
            assert ratio == pytest.approx(width / height, rel=0.01)  # whole pixels


def test_names_from_strangers_stay_text(pages: dict[str, str], hostile: ImportanceMatrix) -> None:
    page = pages["hostile"]
    tree = parsed(page)
    assert len(every(tree, "script")) == 1
    assert len(every(tree, "img")) == len(every(tree, "picture"))
    assert not every(tree, "b")
    text = text_of(tree)
    for name in (f"blk.0.{HOSTILE}.weight", "{{ 7 * 7 }}{% raw %}", "وزن_الانتباه", "x" * 400):
        assert name in text
    assert text_of(every(tree, "h1")[0]) == HOSTILE + r"\u202e"
    assert facts(tree)["Collected by"] == HOSTILE
    assert r"blk.2.ffn_\u202egnp.exe" in text
    assert r"\x1b[31mred\x00\uffff\r\n" in text
    # nothing changes the direction of what follows, and the effect of letters ends with their name
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u200e\u200f]", page)
    around = {child: parent for parent in tree.iter() for child in parent}
    for each in tree.iter():
        if each.text and "وزن" in each.text and each.tag != "img":
            assert "bdi" in (each.tag, around[each].tag)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, naïve 文字 עברית 👩‍🚀", "plain, naïve 文字 עברית 👩‍🚀"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("\x00\x1b\x7f\x85", r"\x00\x1b\x7f\x85"),
        ("\ud800\ufffe\U0010ffff", r"\ud800\ufffe\U0010ffff"),
        ("two\nlines\t", "two\nlines\t"),
    ],
)
def test_what_a_page_must_not_hold_is_spelled_out(text: str, expected: str) -> None:
    assert plain(text) == expected


def test_the_figures_are_those_of_the_matrix(
    pages: dict[str, str], experts: ImportanceMatrix
) -> None:
    tree = parsed(pages["experts"])
    rows = table(tree, "Rows of the experts, by block")
    keys = (
        "block",
        "part",
        "experts",
        "no rows",
        "1\N{EN DASH}31 rows",
        "fewest",
        "median",
        "most",
    )
    assert [tuple(row[key] for key in keys) for row in rows] == [
        ("0", "trunk", "4", "1", "2", "0", "18", "4,000"),
        ("1", "head", "4", "0", "0", "32", "36", "1,000,000"),
    ]
    thinnest = table(tree, "The thinnest experts")
    assert [(row["block"], row["expert"], row["rows"]) for row in thinnest[:4]] == [
        ("0", "0", "0"),
        ("0", "1", "5"),
        ("0", "2", "31"),
        ("1", "0", "32"),
    ]
    (few,) = table(tree, "Weights without experts, or without any row")
    assert few == {"weight": "blk.1.nextn.eh_proj.weight", "rows": "10"}
    heaviest = table(tree, "Weights with the heaviest channels")[0]
    # one channel of 64 has 937 of 1000
    assert heaviest == {
        "weight": "blk.1.nextn.eh_proj.weight",
        "part": "head",
        "peak": f"{937 / (1000 / 64):.4g}",
        "channel": "63",
        "its share": "93.7 %",
        "constant": "86.4 %",  # 9² / 93.7
        "heaviest 1 %": "93.7 %",
    }
    others = table(tree, "Weights with the heaviest channels")[1:]
    assert {row["constant"] for row in others} == {"\N{EN DASH}"}  # there are no signed sums
    weights = {row["weight"]: row for row in table(tree, WEIGHTS)}
    assert set(weights) == set(experts)
    for name, row in weights.items():
        entry = experts[name]
        seen = np.broadcast_to(entry.counts > 0, entry.n_mat)
        means = (entry.sums / np.maximum(entry.counts, 1)[:, None])[seen]
        # float32, as llama-imatrix computes, shown with four digits
        assert float(row["μ"]) == pytest.approx(means.mean(), rel=1e-3)
        assert float(row["Max"]) == pytest.approx(means.max(), rel=1e-3)
        assert float(row["Σ(Act²)"]) == pytest.approx(means.sum(), rel=1e-3)


WEIGHTS = "Statistics of every weight that saw rows; the columns with signs are llama-imatrix's"


def test_how_it_was_made_and_from_what(pages: dict[str, str]) -> None:
    tree = parsed(pages["experts"])
    made = facts(tree)
    assert made["Engine"] == "llama.cpp 1.2"
    assert made["MTP head"] == "collected"
    assert made["Packing"] == "document no chunk has tokens of two documents"
    assert made["Order of the text"] == "shuffled with seed 7"
    assert made["Digest of the tokens"].startswith("ab" * 32)
    assert made["Chunks left out"].endswith("3 at token 1,536 (blk.0.attn_q.weight)")
    assert table(tree, "Sources of the text") == [
        {
            "source": "b.txt",
            "tokens": "7,500",
            "share": "75.0 %",
            "weight": "0.75",
            "documents": "1,234",
            "dropped": "0",
        },
        {
            "source": "a.txt",
            "tokens": "2,500",
            "share": "25.0 %",
            "weight": "0.25",
            "documents": "4",
            "dropped": "11",
        },
    ]
    # one of eight experts saw nothing, and one chunk was left out
    assert [verdict.split(" ", 2)[1] for verdict in verdicts(tree)] == ["not", "gaps", "left"]
    assert "1 of 8 experts saw no row" in verdicts(tree)[1]


def test_old_files_say_what_is_unknown(pages: dict[str, str], shipped: Path) -> None:
    made = facts(parsed(pages["dat"]))
    unknown = {label for label, value in made.items() if value.startswith("unknown")}
    assert unknown == {
        *("Collected by", "Engine", "Context", "Packing", "Order of the text"),
        *("Chunks left out", "Digest of the tokens"),
    }
    text = text_of(parsed(pages["dat"]))
    assert "how many rows an expert saw is unknown" in text
    assert "calibration.txt" in text
    # llama-imatrix's file has neither provenance nor sources
    old = ImportanceMatrix.load(shipped / "trunk-only.gguf")
    tree = parsed(
        report_page(
            ImportanceMatrix(dict(old), datasets=["x.txt"], chunk_count=4, chunk_size=512),
            pictures=False,
        )
    )
    assert facts(tree)["Collected by"] == "unknown"
    assert "How many tokens came from each is unknown" in text_of(tree)
    assert "2,048 chunks times their size" in text_of(tree)
    bare = text_of(parsed(pages["bare"]))
    assert "the file names no text" in bare
    assert "1 weight saw no row" in bare


def test_the_preflight_stops_where_llama_quantize_does(
    pages: dict[str, str], shipped: Path, engine_tool: Callable[[str], Path], tmp_path: Path
) -> None:
    tree = parsed(pages["failing"])
    by_type = {row["type"]: row for row in table(tree, TYPES)}
    command = [engine_tool("llama-quantize"), "--imatrix", shipped / "trunk-only.gguf"]
    for ftype, row in by_type.items():
        model = DATA / "tiny-glm4moe-mtp.gguf"
        done = subprocess.run(
            [*command, model, tmp_path / "out.gguf", ftype, "1"],
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        log = done.stdout + done.stderr
        assert ("ready" in row["verdict"]) == (done.returncode == 0), log
        if done.returncode:
            named = re.search(r"Missing importance matrix for tensor (\S+)", log)[1]
            failing = table(tree, f"{ftype}: tensors that would stop the quantizer")
            assert failing[0]["tensor"] == named
            assert int(row["would fail"]) == len(failing)
    assert set(by_type) == {"IQ2_XXS", "Q4_K_M"}
    assert "would not quantize to IQ2_XXS: it stops at blk.4." in verdicts(tree)[0]
    assert "imatrix collect -m" in text_of(tree)


TYPES = "By type: tensors that stop it, that lack data, that saw few rows"


def test_a_full_matrix_is_ready_for_the_common_types(pages: dict[str, str]) -> None:
    rows = table(parsed(pages["whole"]), TYPES)
    assert len(rows) == 11
    assert all(row["would fail"] == "0" for row in rows)
    sizes = [float(row["bits per weight"]) for row in rows]
    assert max(sizes) < 6
    assert min(sizes) > 1.5


def test_sizes_are_sorted_by_bytes(pages: dict[str, str]) -> None:
    """A size is in the unit that fits it, so that the script goes by the bytes that its cell names."""
    assert "cell.dataset.value ??" in (TEMPLATES / "sort.js").read_text("utf-8")
    n_sizes = 0
    for page in pages.values():
        for each in parsed(page).iter("table"):
            if each.get("class") != "sortable":
                continue
            for cell in each.iter("td"):
                if found := re.fullmatch(r"([0-9.]+) ([KMGT]i)?B", text_of(cell)):
                    n_sizes += 1
                    unit = 1024 ** "KMGT".index(found[2][0]) * 1024 if found[2] else 1
                    # it is told with one digit behind the point
                    assert abs(int(cell.get("data-value", "")) / unit - float(found[1])) <= 0.051
    assert n_sizes >= 11
    # of the same weights more bits are more bytes
    (types,) = [each for each in parsed(pages["whole"]).iter("table") if text_of(each[0]) == TYPES]
    rows = [[*row] for row in types.find("tbody")]
    values = {float(text_of(row[-1])): int(row[-2].get("data-value", "")) for row in rows}
    assert [values[bits] for bits in sorted(values)] == sorted(values.values())


def test_beside_another_matrix(pages: dict[str, str], experts: ImportanceMatrix) -> None:
    same = table(parsed(pages["experts"]), COMPARED)
    assert {row["weight"] for row in same} == set(experts)
    assert all((row["cosine"], row["relative L2"]) == ("1", "0") for row in same)
    tree = parsed(pages["whole"])
    compared = table(tree, COMPARED)
    assert all(row["part"] == "trunk" for row in compared)
    assert "12 in this matrix only" in text_of(tree)  # the head's


COMPARED = "The least alike first; of a weight with experts, its least alike expert"


def test_a_large_model_makes_a_page_that_loads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = {}
    for block in range(94):
        rows = rng.poisson(rng.lognormal(4, 2, 128))
        for kind in ("gate", "up", "down"):
            sums = rng.lognormal(0, 2, (128, 32)) * rows[:, None]
            entries[f"blk.{block}.ffn_{kind}_exps.weight"] = Entry(sums, rows)
        for kind in range(17):
            entries[f"blk.{block}.kind_{kind}.weight"] = Entry(rng.random((1, 64)), [9000])
    matrix = ImportanceMatrix(entries, chunk_count=1, chunk_size=512)
    page = report_page(matrix, against=matrix)
    assert len(page.encode()) < 5_000_000
    assert len(table(parsed(page), WEIGHTS)) == 94 * 20


def test_names_that_cannot_be_drawn_leave_the_tables() -> None:
    entries = {f"blk.0.k{n}": Entry(np.ones((1, 4)), [50]) for n in range(400)}
    tree = parsed(report_page(ImportanceMatrix(entries)))
    assert "No picture: there are 400 kinds of weights" in text_of(tree)
    assert len(table(tree, WEIGHTS)) == 400


def test_the_same_arguments_give_the_same_page(shipped: Path) -> None:
    file = shipped / "with-head.gguf"
    assert report_page(file) == report_page(file)


# --- colours -----------------------------------------------------------------


def colours() -> Iterator[tuple[str, dict[str, str]]]:
    """The custom properties of the style sheet, for light and for dark."""
    style = (TEMPLATES / "report.css").read_text("utf-8")
    blocks = re.findall(r":root \{([^}]*)\}", style)
    light = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", blocks[0]))
    dark = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", blocks[1]))
    assert light.keys() == dark.keys()
    yield "light", light
    yield "dark", dark


def contrast(one: str, other: str) -> float:
    """The contrast ratio by WCAG 2.2, from 1 to 21."""

    def luminance(colour: str) -> float:
        values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "found"), list(colours()))
def test_text_stands_out_in_light_and_in_dark(scheme: str, found: dict[str, str]) -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    pairs = [(text, back) for text in ("text", "muted", "accent") for back in PAPERS]
    pairs += [(level, back) for level in ("warn", "bad") for back in PAPERS]
    pairs += [(level, f"{level}-back") for level in ("good", "warn", "bad", "note")]
    for text, back in pairs:
        assert contrast(found[text], found[back]) >= 4.5, (scheme, text, back)


PAPERS = ("page", "card", "stripe")


# --- the command -------------------------------------------------------------


def test_the_command_writes_the_page(
    shipped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    argv = ["report", str(shipped / "with-head.gguf"), "--no-pictures", "-o", str(out)]
    assert cli.main(argv) == 0
    assert "wrote" in capsys.readouterr().err
    assert text_of(every(parsed(out.read_text("utf-8")), "h1")[0]) == "with-head.gguf"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--type", "IQ2_XXS"], "no model to check them on"),
        (["-m", "MODEL", "--type", "IQ9"], "unknown type 'IQ9'"),
        (["-m", "nothing.gguf"], "no such model file"),
        (["--against", "nothing.gguf"], "nothing.gguf"),
        (["-o", "MATRIX"], "would replace the input"),
    ],
)
def test_the_command_refuses_and_leaves_the_old_page(
    shipped: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    out = tmp_path / "page.html"
    out.write_text("old")
    paths = {"MODEL": str(DATA / "tiny-glm4moe-mtp.gguf"), "MATRIX": str(shipped / "with-head.dat")}
    more = [paths.get(each, each) for each in more]
    argv = ["report", paths["MATRIX"], "--no-pictures", "-o", str(out), *more]
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err
    assert out.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_a_matrix_without_entries_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to report"):
        report_page(ImportanceMatrix({}))
