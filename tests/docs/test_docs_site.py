"""The site that `make docs` builds: without warnings, complete, and without anything from other
sites."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import imatrix

ROOT = Path(__file__).resolve().parents[2]


class Found(HTMLParser):
    """What an HTML page loads, and the ids in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if tag == "link" and given.get("rel") not in ("stylesheet", "preload", "icon"):
            return  # index, search, next: links to follow, which load nothing
        key = {"script": "src", "img": "src", "iframe": "src", "link": "href"}.get(tag)
        if key is not None and given.get(key):
            self.loads.append(str(given[key]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
    command += ["-c", str(ROOT / "docs"), "-d", str(out / "doctrees"), str(ROOT), str(out / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out / "html"


def test_every_page_is_there(site: Path) -> None:
    assert (site / "index.html").is_file()
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages == {path.stem for path in (site / "docs").glob("*.html")}


def test_it_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for target in Found(path).loads:
            assert "//" not in target, f"{path.name} loads {target}"
    for path in site.rglob("*.css"):
        style = path.read_text(encoding="utf-8")
        assert re.search(r"(@import|url\()\s*['\"]?(\w+:)?//", style) is None, path.name


def test_the_api_page_has_every_public_name(site: Path) -> None:
    ids = Found(site / "docs" / "api.html").ids
    public = [name for name in imatrix.__all__ if not name.startswith("__")]
    assert [name for name in public if f"imatrix.{name}" not in ids] == []


def test_the_recipes_quote_the_study() -> None:
    """Rows of the study's table stand in docs/types.md exactly as in its report."""
    study = (ROOT / "benchmarks" / "results" / "quality.md").read_text(encoding="utf-8")
    section = study.split("## Trunk at Q8_0, in-domain")[1].split("\n## ")[0].splitlines()
    page = (ROOT / "docs" / "types.md").read_text(encoding="utf-8").splitlines()
    quoted = [line for line in page if line.startswith("|")]
    assert len(quoted) > 10
    assert [line for line in quoted if line not in section] == []
