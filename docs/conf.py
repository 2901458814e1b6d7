"""The site: Sphinx over the same Markdown files that a forge shows (MyST).

The source folder is the root of the tree, so that links such as ../CONTRIBUTING.md are the same on a
forge and on the site. `make docs` builds it, and takes every warning for an error: a broken link, a
missing heading, a page that docs/index.md does not name.
"""

from __future__ import annotations

import re
from pathlib import Path

from docutils import nodes
from markdown_it import MarkdownIt
from sphinx.application import Sphinx

from imatrix import __version__

ROOT = Path(__file__).resolve().parents[1]

project = "imatrix"
release = version = __version__
project_copyright = "the imatrix authors, MIT licence"

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
root_doc = "docs/index"
include_patterns = ["docs/*.md", "benchmarks/results/*.md", "CHANGELOG.md", "CONTRIBUTING.md"]
# folders that Sphinx would search too
exclude_patterns = [".*", "build", "dist", "src", "tests", "vendor"]

myst_heading_anchors = 4  # page.md#heading, as on a forge
smartquotes = False  # flags begin with --
default_role = "literal"  # `x` in docstrings is code

autodoc_member_order = "bysource"
maximum_signature_line_length = 80
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
# Sphinx makes links of the attributes' names, and several classes have a `trunk`
suppress_warnings = ["ref.python"]

html_theme = "furo"
html_title = f"imatrix {release}"
html_copy_source = False
html_show_sourcelink = False
html_extra_path = ["site"]  # index.html, which leads to docs/index.html
html_static_path = ["site-style"]
html_css_files = ["site.css"]
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
copybutton_here_doc_delimiter = "END"


def _navigation(_app: Sphinx, name: str, source: list[str]) -> None:
    """Gives docs/index.md its tables of contents: each heading with a list of links below it gets one
    with these links. So one list serves the readers of a forge and the site's navigation."""
    if name != root_doc:
        return
    captions: dict[str, list[str]] = {}
    caption = ""
    tokens = MarkdownIt("commonmark").parse(source[0])
    depth = 0
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and after is not None:
            caption = after.content
        depth += {"bullet_list_open": 1, "bullet_list_close": -1}.get(token.type, 0)
        if token.type == "inline" and depth and caption:
            links = [child for child in token.children or () if child.type == "link_open"]
            target = str(links[0].attrs["href"]) if links else ""
            if target.endswith(".md"):  # the item's first link is the page it is for
                captions.setdefault(caption, []).append(_document(target))
    source[0] += "".join(
        f"\n```{{toctree}}\n:hidden:\n:caption: {caption}\n\n" + "\n".join(pages) + "\n```\n"
        for caption, pages in captions.items()
    )


def _document(target: str) -> str:
    path = (ROOT / "docs" / target).resolve().relative_to(ROOT)
    return "/" + path.with_suffix("").as_posix()


# characters that reStructuredText would take for markup
_MARKUP = re.compile(r"(?<![\\`\w])[*|](?=\S)|(?<=\S)[*|]|(?<=\w)_(?=\W|$)")


def _docstring(
    _app: Sphinx, what: str, _name: str, _object: object, _options: object, lines: list[str]
) -> None:
    """Docstrings are plain text, so stars and trailing underscores are escaped."""
    if what in ("property", "attribute"):
        lines.insert(0, "")  # napoleon takes "Trunk blocks: …" on a first line for a type
    for i, line in enumerate(lines):
        pieces = re.split(r"(`+[^`]*`+|:\w+(?: [^:]*)?:)", line)
        pieces[::2] = [_MARKUP.sub(lambda found: "\\" + found[0], piece) for piece in pieces[::2]]
        lines[i] = "".join(pieces)


def _dashes(_app: Sphinx, tree: nodes.document) -> None:
    """Puts a dash in place of the " -- " that Sphinx writes behind the name of an argument."""
    for text in list(tree.findall(nodes.Text)):
        if text.astext() == " -- ":
            text.parent.replace(text, nodes.Text(" \N{EN DASH} "))


def setup(app: Sphinx) -> None:
    """Sphinx calls this function."""
    app.connect("source-read", _navigation)
    app.connect("doctree-read", _dashes)
    app.connect("autodoc-process-docstring", _docstring, priority=100)  # before napoleon
