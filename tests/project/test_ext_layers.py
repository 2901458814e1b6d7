"""ext/ has layers: the files that a file includes are below it, and CONTRIBUTING.md shows the same
table."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
EXT = ROOT / "ext"

# From the bottom up; a file here is a header with its source. CONTRIBUTING.md repeats the table.
LAYERS = (
    ("status", "live", "parallel", "row_kernels", "scores"),
    ("add_rows", "sums", "engine_log", "placement", "graph_check"),
    (
        "model_header",
        "backend_modules",
        "engine_context",
        "wanted_nodes",
        "device_sums",
        "staged_rows",
    ),
    ("model", "engine_info", "graph_plan", "graph_start", "eval_hook", "product"),
    ("contexts", "weights"),
    ("memory_use",),
    ("session", "evaluator"),
    ("trials",),
)
LAYER_OF = {name: number for number, layer in enumerate(LAYERS, 1) for name in layer}
# A file that a person can read in one go.
MOST_LINES = 500


def sources() -> Iterator[Path]:
    return (path for path in sorted(EXT.iterdir()) if path.suffix in (".h", ".cpp"))


def included(source: Path) -> list[str]:
    """The headers of ext/ that a file includes; the engine's headers are no files of ext/."""
    found = re.findall(r'^\s*#\s*include\s*["<]([^">]+)[">]', source.read_text(), re.MULTILINE)
    return [Path(name).stem for name in found if (EXT / name).is_file()]


def test_every_file_has_its_layer() -> None:
    assert sorted(LAYER_OF) == sorted({path.stem for path in sources()})
    assert sum(map(len, LAYERS)) == len(LAYER_OF), "a file stands in two layers"


def test_what_a_file_includes_is_below_it() -> None:
    seen = 0
    above = []
    for source in sources():
        for name in included(source):
            seen += 1
            if name != source.stem and LAYER_OF[name] >= LAYER_OF[source.stem]:
                above.append(f"{source.name} includes {name}.h")
    assert above == []
    assert seen > len(LAYER_OF)  # each source includes its own header, and more


def test_a_source_includes_its_header_first() -> None:
    """Otherwise a header that relies on what others include before it would not be found out."""
    for source in sources():
        if source.suffix == ".cpp":
            assert included(source)[0] == source.stem, source.name


def test_files_are_short() -> None:
    lengths = {path.name: path.read_text().count("\n") for path in sources()}
    assert {name: n for name, n in lengths.items() if n >= MOST_LINES} == {}


def test_contributing_has_the_same_table() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("\n## ext/\n", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    assert [(int(number), name) for number, name, _ in rows] == [
        (number, name) for number, layer in enumerate(LAYERS, 1) for name in layer
    ]
    assert [row for row in rows if not row[2].rstrip().endswith(".")] == []  # one sentence for each
