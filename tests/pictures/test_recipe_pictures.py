"""Pictures of recipes: cells, curves and points are those of the recipe's JSON file, counted anew."""

from __future__ import annotations

import itertools
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.recipes import BITS, recipe_data, small_source
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from imatrix import Entry, ImportanceMatrix, pictures
from imatrix.cli.program import main
from imatrix.pictures.labels import Label, place_labels
from imatrix.quantization.recipe import Recipe

PARTS = ("trunk", "head", "no block")
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a recipe's file; gives its path."""

    def write_(**changes: Any) -> Path:
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(recipe_data(**changes)), encoding="utf-8")
        return path

    return write_


def axes_of(figure: Figure, label: str) -> Axes:
    (found,) = [axes for axes in figure.axes if axes.get_label() == label]
    return found


def offsets(axes: Axes, label: str) -> list[tuple[float, float]]:
    """The points of all lines with that label."""
    return [
        (float(x), float(y))
        for line in axes.lines
        if line.get_label() == label
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    ]


def drawn(figure: Figure) -> tuple[dict[str, float], dict[str, str]]:
    """Bits and texts of the cells, by the tensor that the labels name."""
    (first, *_) = [axes for axes in figure.axes if axes.get_label() in PARTS]
    rows = [text.get_text() for text in first.get_yticklabels()]
    bits, texts = {}, {}
    for axes in figure.axes:
        if axes.get_label() not in PARTS:
            continue
        columns = [text.get_text() for text in axes.get_xticklabels()] or [""]
        array = np.ma.filled(axes.images[0].get_array().astype(float), np.nan)
        assert array.shape == (len(rows), len(columns))

        def name(row: int, column: int, columns: list[str] = columns) -> str:
            block = f"blk.{columns[column]}." if columns[column] else ""
            return f"{block}{rows[row]}.weight"

        for place in itertools.product(range(len(rows)), range(len(columns))):
            if np.isfinite(array[place]):
                bits[name(*place)] = float(array[place])
        for text in axes.texts:
            column, row = text.get_position()
            texts[name(round(row), round(column))] = text.get_text()
    return bits, texts


def expected_types(data: dict[str, Any]) -> dict[str, str]:
    """What the map shows, from the file."""
    return {
        name: data["types"].get(name, kind)
        for name, (kind, _) in data["source"].items()
        if name in data["types"] or kind != "f32"
    }


class TestBits:
    @pytest.mark.parametrize("seed", range(3))
    def test_cells(self, write: Write, seed: int) -> None:
        types = expected_types(recipe_data(seed=seed))
        bits, texts = drawn(pictures.bits(Recipe.load(write(seed=seed))))
        assert bits == {name: BITS[kind] for name, kind in types.items()}
        assert texts == {name: kind.upper() for name, kind in types.items()}

    def test_the_head_and_what_is_in_no_block_stand_apart(self, write: Write) -> None:
        figure = pictures.bits(Recipe.load(write()))
        columns = {
            part: [text.get_text() for text in axes_of(figure, part).get_xticklabels()]
            for part in PARTS
        }
        assert columns == {"trunk": ["0", "1", "2"], "head": ["3"], "no block": []}
        places = [axes_of(figure, part).get_position() for part in PARTS]
        assert places[0].x1 < places[1].x0 < places[1].x1 < places[2].x0

    def test_the_legend_names_each_type_with_its_bits(self, write: Write) -> None:
        types = set(expected_types(recipe_data()).values())
        words = [text.get_text() for text in pictures.bits(Recipe.load(write())).texts]
        found = {}
        for each in words:
            if match := re.fullmatch(r"((?:[A-Z0-9_]+(?:, )?)+): ([0-9.]+)", each):
                found |= dict.fromkeys(match[1].split(", "), float(match[2]))
        # four digits are written
        assert found == {kind.upper(): pytest.approx(BITS[kind], rel=5e-4) for kind in types}

    def test_colours_are_the_same_in_all_pictures(self, write: Write) -> None:
        """Whatever types come up: two recipes may be compared by eye."""
        low = dict.fromkeys(recipe_data()["types"], "iq2_xxs")
        figures = [
            pictures.bits(Recipe.load(write())),
            pictures.bits(Recipe.load(write(types=low))),
        ]
        norms = [axes_of(figure, "trunk").images[0].norm for figure in figures]
        assert (norms[0].vmin, norms[0].vmax) == (norms[1].vmin, norms[1].vmax)

    @pytest.mark.parametrize("style", ["light", "dark"])
    def test_names_can_be_read(self, write: Write, style: Any) -> None:
        """Black or white, whichever has the contrast of 4.5 that WCAG 2.2 asks for (AA)."""
        figure = pictures.bits(Recipe.load(write()), style=style)
        seen = set()
        for part in PARTS:
            axes = axes_of(figure, part)
            image = axes.images[0]
            for text in axes.texts:
                column, row = map(round, text.get_position())
                colour = image.cmap(image.norm(image.get_array()[row, column]))
                assert contrast(to_rgb(text.get_color()), to_rgb(colour)) >= 4.5, text
                seen.add(text.get_color())
        assert seen == {"#000000", "#ffffff"}

    def test_many_blocks(self, write: Write) -> None:
        """The trunk's names have no room; those of the head and of the embeddings do."""
        source = small_source(60)
        figure = pictures.bits(Recipe.load(write(source=source)))
        bits = drawn_image(figure, "trunk")
        types = expected_types(recipe_data(source=source))
        rows = [text.get_text() for text in axes_of(figure, "trunk").get_yticklabels()]
        for block, (n, kind) in itertools.product(range(59), enumerate(rows)):
            found = types.get(f"blk.{block}.{kind}.weight")
            assert bits[n, block] == BITS[found] if found else np.isnan(bits[n, block])
        assert not axes_of(figure, "trunk").texts
        assert {text.get_text() for text in axes_of(figure, "head").texts} <= {
            kind.upper() for kind in BITS
        }
        assert axes_of(figure, "head").texts
        assert figure.get_figwidth() < 12

    def test_nothing_to_draw(self, write: Write) -> None:
        source = {"blk.0.attn_norm.weight": ("f32", (256,))}
        with pytest.raises(ValueError, match="has a type for no tensor"):
            pictures.bits(Recipe.load(write(source=source)))


def contrast(one: Sequence[float], other: Sequence[float]) -> float:
    """The ratio of two colours' luminances, as WCAG 2 defines it (w3.org/TR/WCAG21)."""
    light, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Sequence[float]) -> float:
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def drawn_image(figure: Figure, part: str) -> Any:
    return np.ma.filled(axes_of(figure, part).images[0].get_array().astype(float), np.nan)


class TestFrontier:
    def test_points(self, write: Write) -> None:
        data = recipe_data()["frontier"]
        axes = axes_of(pictures.frontier(Recipe.load(write())), "frontier")
        curve = [*zip(data["predicted"]["bytes"], data["predicted"]["kl"], strict=True)]
        # the last has a KL of 0, which a logarithmic axis has no place for
        assert offsets(axes, "predicted") == curve[:-1]
        for key in ("measured", "mixtures"):
            expected = [(point["bytes"], point["kl"]) for point in data[key]]
            assert offsets(axes, key) == expected
        assert offsets(axes, "recipe") == [(3_000_000, 0.3)]
        chosen = {line.get_xdata()[0] for line in axes.lines if line.get_label() == "chosen"}
        assert chosen == {2_500_000, 3_000_000}
        assert axes.get_yscale() == "log"

    def test_intervals(self, write: Write) -> None:
        """95 % of a normal distribution: 1.96 standard errors to each side. One that reaches down to
        0 or below is cut at a tenth of its value."""
        axes = axes_of(pictures.frontier(Recipe.load(write())), "frontier")
        found = {
            (str(lines.get_label()), float(x)): (float(low), float(high))
            for lines in axes.collections
            for (x, low), (_, high) in lines.get_segments()
        }
        assert found == {
            ("measured intervals", 2_500_000.0): pytest.approx((0.6 - 0.0588, 0.6 + 0.0588)),
            ("measured intervals", 3_000_000.0): pytest.approx((0.3 - 0.0392, 0.3 + 0.0392)),
            ("measured intervals", 3_400_000.0): pytest.approx((0.002, 0.02 + 0.0392)),
            ("mixtures intervals", 2_900_000.0): pytest.approx((0.5, 0.5)),  # has no error
            ("mixtures intervals", 3_100_000.0): pytest.approx((0.4 - 0.0588, 0.4 + 0.0588)),
            ("mixtures intervals", 3_110_000.0): pytest.approx((0.39 - 0.0588, 0.39 + 0.0588)),
        }

    def test_all_that_is_marked_is_in_sight(self, write: Write) -> None:
        axes = axes_of(pictures.frontier(Recipe.load(write())), "frontier")
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        for label in ("measured", "mixtures", "recipe"):
            for size, kl in offsets(axes, label):
                assert left < size < right
                assert bottom < kl < top

    def test_mixtures_are_named_beside_their_marks(self, write: Write) -> None:
        figure = pictures.frontier(Recipe.load(write()))
        axes = axes_of(figure, "frontier")
        names = {text.get_text(): text for text in figure.texts}
        figure.canvas.draw()
        boxes = []
        for point in recipe_data()["frontier"]["mixtures"]:
            text = names[point["name"].replace("\x01", "\N{REPLACEMENT CHARACTER}")]
            box = text.get_window_extent()
            x, y = axes.transData.transform((point["bytes"], point["kl"]))
            # within three steps and the size of the text, of pixels
            reach = 0.3 * figure.dpi
            assert box.x0 - reach <= x <= box.x1 + reach
            assert box.y0 - reach <= y <= box.y1 + reach
            boxes.append(box)
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))

    @pytest.mark.parametrize("unit", [1, 1024**2, 1024**3])
    def test_ticks_are_round_sizes(self, write: Write, unit: int) -> None:
        frontier = {
            "predicted": {"bytes": [2 * unit, 3 * unit, 5 * unit], "kl": [1.0, 0.5, 0.1]},
            "measured": [],
            "mixtures": [],
            "chosen": [],
        }
        path = write(frontier=frontier, bytes=4 * unit, measured_kl=None)
        axes = axes_of(pictures.frontier(Recipe.load(path)), "frontier")
        name = {1: "bytes", 1024**2: "MiB", 1024**3: "GiB"}[unit]
        assert axes.get_xlabel() == f"size of the file, {name}"
        ticks = {float(text.get_text()): at for text, at in zip(
            axes.get_xticklabels(), axes.get_xticks(), strict=True)}  # fmt: skip
        assert len(ticks) > 2
        assert all(at == pytest.approx(number * unit) for number, at in ticks.items())
        assert offsets(axes, "recipe") == [(4 * unit, 0.25)]  # as predicted: nothing was measured

    def test_of_a_curve_alone_all_is_shown(self, write: Write) -> None:
        frontier = recipe_data()["frontier"] | {"measured": [], "mixtures": [], "chosen": []}
        path = write(frontier=frontier, measured_kl=None, predicted_kl=None)
        axes = axes_of(pictures.frontier(Recipe.load(path)), "frontier")
        left, right = axes.get_xlim()
        assert left < 2_000_000
        assert right > 2_000_000 + 10_000 * 198

    def test_nothing_to_draw(self, write: Write) -> None:
        with pytest.raises(ValueError, match="does not keep one; its types can be drawn"):
            pictures.frontier(Recipe.load(write(frontier=None)))
        empty = {"predicted": {"bytes": [5], "kl": [0.0]}, "measured": [], "mixtures": [],
                 "chosen": [5]}  # fmt: skip
        with pytest.raises(ValueError, match="no point with a KL above 0"):
            pictures.frontier(Recipe.load(write(frontier=empty)))


class TestBoth:
    def test_side_by_side_or_one_above_the_other(self, write: Write) -> None:
        found = Recipe.load(write())
        wide, narrow = pictures.recipe(found), pictures.recipe(found, width=3.6)
        for figure, beside in ((wide, True), (narrow, False)):
            curve, map_ = (axes_of(figure, each).get_position() for each in ("frontier", "trunk"))
            assert (curve.x1 < map_.x0) == beside
            assert (curve.y0 > map_.y1) != beside
            assert drawn_image(figure, "trunk").shape == drawn_image(wide, "trunk").shape

    def test_without_a_frontier_it_is_the_map(self, write: Write) -> None:
        figure = pictures.recipe(Recipe.load(write(frontier=None)))
        assert {axes.get_label() for axes in figure.axes} == set(PARTS)

    def test_the_heading_tells_size_and_kl(self, write: Write) -> None:
        words = " ".join(t.get_text() for t in pictures.recipe(Recipe.load(write())).texts)
        assert "small-F16.gguf: 2.9 MiB, 3.88 bits a weight; head: block 3" in words
        # 1.96 standard errors
        assert "KL 0.3 ± 0.039 measured, 0.25 predicted; nats a token" in words

    def test_names_from_strangers(self, write: Write) -> None:
        path = write(model="$\\frac{</svg>\x00", text="<b>")
        text = pictures.svg(pictures.recipe(Recipe.load(path)))
        words = " ".join("".join(each.itertext()) for each in ET.fromstring(text).iter())
        assert "$\\frac{</svg>\N{REPLACEMENT CHARACTER}" in words
        assert "$\\frac{a$<b>\N{REPLACEMENT CHARACTER}" in words

    def test_the_same_recipe_gives_the_same_bytes(self, write: Write) -> None:
        found = Recipe.load(write())
        assert pictures.svg(pictures.recipe(found)) == pictures.svg(pictures.recipe(found))
        assert pictures.png(pictures.recipe(found)) == pictures.png(pictures.recipe(found))


def test_labels_avoid_each_other_and_what_is_taken() -> None:
    """One mark alone: right above it. A line of marks right of it: the text goes elsewhere."""
    label = Label("Q4_K_M", 1.0, 1.0)
    ((x, y),) = place_labels([label], [(1.0, 1.0)], [], (4.0, 3.0))
    assert 1.0 < x < 1.15
    assert 0.7 < y < 1.0
    right = [(1.1 + 0.05 * n, 0.6 + 0.05 * m) for n in range(20) for m in range(16)]
    ((x, _),) = place_labels([label], right, [], (4.0, 3.0))
    assert x < 1.0
    # in the corner there is room on one side only
    ((x, y),) = place_labels([Label("Q4_K_M", 3.95, 0.02)], [], [], (4.0, 3.0))
    assert x < 3.9
    assert y >= 0


class TestCommand:
    @pytest.mark.parametrize(
        ("flags", "says", "labels"),
        [
            ([], "KL divergence by size, types by block", {"frontier", *PARTS}),
            (["--kind", "recipe", "--style", "dark"], "types by block", {"frontier", *PARTS}),
            (["--kind", "bits", "--width", "4"], "Types by block and kind", set(PARTS)),
            (["--kind", "frontier"], "KL divergence by size", {"frontier"}),
        ],
    )
    def test_kinds(
        self,
        write: Write,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        flags: list[str],
        says: str,
        labels: set[str],
    ) -> None:
        path = write()
        out, kept = path.with_name("out.png"), []
        save = pictures.save
        monkeypatch.setattr(
            pictures, "save", lambda figure, *args, **more: (
                kept.append(figure), save(figure, *args, **more)
            )
        )  # fmt: skip
        assert main(["plot", str(path), "-o", str(out), *flags]) == 0
        assert says in capsys.readouterr().err
        assert {axes.get_label() for axes in kept[0].axes} == labels
        with Image.open(out) as image:
            assert image.width > 500

    @pytest.mark.parametrize(
        ("flags", "says"),
        [
            (["--kind", "layers"], "no importance matrix but JSON"),
            (["--weight", "output"], "no importance matrix but JSON"),
            (["--kind", "bits", "--statistic", "top"], "--kind bits has no use for --statistic"),
            (["--heaviest", "3"], "--kind recipe has no use for --heaviest"),
            (["--width", "100"], "3 to 40 inches"),
        ],
    )
    def test_flags(
        self, write: Write, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
    ) -> None:
        path = write()
        out = path.with_name("out.png")
        assert main(["plot", str(path), "-o", str(out), *flags]) == 2
        assert says in capsys.readouterr().err
        assert not out.exists()

    @pytest.mark.parametrize("kind", ["recipe", "bits", "frontier"])
    def test_a_matrix_is_no_recipe(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
    ) -> None:
        ones = Entry(np.ones((1, 8)), [5])
        path = tmp_path / "one.gguf"
        ImportanceMatrix({"blk.0.attn_q.weight": ones}).save(path)
        assert main(["plot", str(path), "-o", str(tmp_path / "o.png"), "--kind", kind]) == 2
        error = capsys.readouterr().err
        assert "needs a recipe" in error
        assert "imatrix recipe writes one" in error

    def test_a_dat_file_that_begins_like_json_is_none(self, tmp_path: Path) -> None:
        """Its first four bytes are the number of its entries: 123 is "{"."""
        ones = Entry(np.ones((1, 8)), [5])
        path = tmp_path / "one.dat"
        ImportanceMatrix({f"blk.{n}.attn_q.weight": ones for n in range(123)}).save(
            path, format="dat"
        )
        assert path.read_bytes()[:1] == b"{"
        assert main(["plot", str(path), "-o", str(tmp_path / "out.png")]) == 0

    @pytest.mark.parametrize("content", ["{}", '{"format": "something else"}', "{", "[1]"])
    def test_json_that_is_no_recipe(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
    ) -> None:
        path = tmp_path / "other.json"
        path.write_text(content)
        assert main(["plot", str(path), "-o", str(tmp_path / "out.png")]) == 2
        assert "other.json" in capsys.readouterr().err
        assert not (tmp_path / "out.png").exists()
