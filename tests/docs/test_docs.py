"""Every fenced block of the documentation does what its page says (docs/writing-docs.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.docs_blocks import Block, BlockError, Page, StandIns, compare, parse, run, stand_ins

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "README.md"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return stand_ins(tmp_path_factory.mktemp("stand-ins"))


@pytest.mark.slow
@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_blocks_of_a_page(path: Path, files: StandIns, tmp_path: Path) -> None:
    failure = None
    try:
        run(parse(path), tmp_path, files)
    except BlockError as error:
        failure = str(error)
    if failure is not None:
        pytest.fail(failure, pytrace=False)


# --- the checks themselves -----------------------------------------------------------------------


def page(tmp_path: Path, text: str) -> Page:
    path = tmp_path / "page.md"
    path.write_text(text, encoding="utf-8")
    return parse(path)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("```\nls\n```\n", "needs a language"),
        ("```sh\nls\n```\n", "needs a language"),
        ("<!-- not run -->\n\n```bash\nls\n```\n", "means nothing"),
        ("<!-- ouput -->\n```text\nx\n```\n", "means nothing"),
        ("```bash\nls\n```\n<!-- output -->\n<!-- vary -->\n```text\nx\n```\n", "means nothing"),
        ("<!-- output -->\n```text\nx\n```\n", "output of what"),
        ("<!-- exit: 1 -->\n```text\nx\n```\n", "is not run"),
        ("```bash\nfalse\n```\n", "exit status 1, expected 0"),
        ("```bash\nfalse | true\n```\n", "exit status 1, expected 0"),
        ("<!-- exit: 2 -->\n```bash\nfalse\n```\n", "exit status 1, expected 2"),
        ("```bash\necho a\n```\n\n<!-- output -->\n```text\nb\n```\n", "the page shows"),
        ("```console\n$ echo a\nb\n```\n", "the page shows"),
        ("```console\n$ false\n$ echo a\na\n```\n", "exit status 1"),
        ("```console\nls\n```\n", "begins with a command"),
        ("```python\nraise KeyError(3)\n```\n", "KeyError: 3"),
        ("```python\nprint(1)\n```\n<!-- output -->\n```text\n2\n```\n", "the page shows"),
        ("<!-- setup: nothing.gguf -->\n", "no stand-in nothing.gguf"),
        ("<!-- setup\nexit 3\n-->\n", "exit status 3"),
    ],
)
def test_a_page_that_is_wrong_fails(text: str, why: str, files: StandIns, tmp_path: Path) -> None:
    with pytest.raises(BlockError, match=why):
        run(page(tmp_path, text), tmp_path, files)


def test_what_a_page_may_ask_for(files: StandIns, tmp_path: Path) -> None:
    text = """
<!-- a comment of no block -->

Words.

<!-- setup
  echo hidden > hidden.txt
-->
<!-- exit: 3 -->
```bash
test -s model-BF16.gguf
cat hidden.txt
exit 3
```
<!-- output -->
```text
hidden
```

<!-- not run: needs a GPU -->
```bash
exit 4
```

```console
$ echo one \\
    two
one two
$ printf 'took 12.5 s\\nb\\nc\\n'; echo late >&2
…
c
late
```

- in a list, too

  ```python
  kept = open("hidden.txt").read()
  ```

```python
print(kept, end="")
```
<!-- output -->
<!-- numbers vary -->
```text
hidd...
```
"""
    found = page(tmp_path, text)
    assert [block.not_run for block in found.blocks] == ["", "needs a GPU", "", "", ""]
    run(found, tmp_path, files)


@pytest.mark.parametrize(
    ("shown", "found", "asked", "same"),
    [
        ("a  \nb", "\na\nb\n\n", {}, True),
        ("a\n…\nd", "a\nb\nc\nd", {}, True),
        ("a\n…\nd", "a\nd", {}, True),
        ("a … c", "a b c", {}, True),
        ("a … c", "a\nc", {}, False),
        ("a 1", "a 2", {}, False),
        ("a 1.5 s", "a 12 s", {"numbers_vary": True}, True),
        ("a 1.5 s", "a 12 ms", {"numbers_vary": True}, False),
        ("+0.5 to -1e-3", "-0.25 to +2.5", {"numbers_vary": True}, True),
        ("│ 1 │\n────", "│   100 │\n──────", {"numbers_vary": True}, True),
        ("a\nb … d", "a b\nc d\n", {"wrapped": True}, True),
        ("a\nb", "a b", {}, False),
        ("a\nb", "a c", {"wrapped": True}, False),
        ("a", "a\nb", {}, False),
    ],
)
def test_what_is_compared(shown: str, found: str, asked: dict[str, bool], same: bool) -> None:
    block = Block("page.md:1", 1, "bash", "", **asked)
    if same:
        compare(block, shown, found)
    else:
        with pytest.raises(BlockError):
            compare(block, shown, found)
