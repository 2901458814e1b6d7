"""Looks at pages of `imatrix report` in a real browser. It is run by hand and needs Chromium and
playwright.

    pip install --group browser
    python tests/browser/check_report.py report.html ... [--pictures FOLDER]

At each width, in light and in dark, with every part opened, it asks: does the page scroll sideways,
does the console complain, does the page ask the network for anything, is text too faint (WCAG 2.2,
AA), can everything that scrolls be reached by keyboard, are targets large enough for fingers (24
CSS pixels), does each picture show? Then: does a heading sort its column, and is nothing missing
without scripts and in print?
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS = {360: 740, 390: 844, 768: 1024, 1280: 800}
SCHEMES = ("light", "dark")

# This runs in the page: relative luminance and contrast as WCAG 2.2 defines them, of every element
# that has text of its own, against the nearest background that is not transparent.
_FAINT = """() => {
  const rgba = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map((v) => {
      v /= 255;
      return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * x + 0.7152 * y + 0.0722 * z;
  };
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const found = rgba(getComputedStyle(element).backgroundColor);
      if (found.length === 3 || found[3] === 1) return found;
      if (found[3] > 0) return null;  // half transparent: none of our styles is
    }
    return [255, 255, 255];
  };
  const faint = {};
  for (const element of document.body.querySelectorAll("*")) {
    const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!own || !element.checkVisibility() || element.tagName === "SCRIPT") continue;
    const back = background(element);
    const style = getComputedStyle(element);
    const pair = back && [luminance(rgba(style.color)), luminance(back)].sort((a, b) => b - a);
    const ratio = pair ? (pair[0] + 0.05) / (pair[1] + 0.05) : 0;
    if (ratio < 4.5) faint[`${element.tagName}.${element.className}`] = ratio.toFixed(2);
  }
  return faint;
}"""

_UNREACHABLE = """() => [...document.querySelectorAll("*")].filter((e) => {
  const style = getComputedStyle(e);
  const scrolls = /auto|scroll/.test(style.overflowX) && e.scrollWidth > e.clientWidth + 1
    || /auto|scroll/.test(style.overflowY) && e.scrollHeight > e.clientHeight + 1;
  return scrolls && e !== document.documentElement && e.tabIndex < 0;
}).map((e) => e.outerHTML.slice(0, 80))"""

# Links in a sentence or a cell are exempt (WCAG 2.2, 2.5.8).
_SMALL = """() => [...document.querySelectorAll("nav a, summary, button")].filter((e) => {
  const box = e.getBoundingClientRect();
  return e.checkVisibility() && box.width && (box.height < 24 || box.width < 24) && !e.closest("th");
}).map((e) => `${e.tagName} ${e.textContent.trim().slice(0, 30)}`)"""

_SIDEWAYS = """() => {
  const root = document.documentElement;
  if (root.scrollWidth <= root.clientWidth) return [];
  return [...document.body.querySelectorAll("*")]
    .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1 && !e.closest(".scroll, pre"))
    .map((e) => e.outerHTML.slice(0, 100)).slice(0, 5).concat(["page: " + root.scrollWidth]);
}"""

_UNSEEN = """() => [...document.images].filter((i) => !i.complete || !i.naturalWidth || !i.alt)
  .map((i) => i.alt.slice(0, 60) || "a picture without a text")"""


def check(browser: Browser, path: Path, pictures: Path | None) -> list[str]:
    """What is wrong with a page, one line for each fault."""
    wrong: list[str] = []
    for scheme in SCHEMES:
        for width, height in WIDTHS.items():
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": height}
            )
            page = context.new_page()
            where = f"{path.name}, {width} px, {scheme}"
            _listen(page, where, wrong)
            page.goto(path.resolve().as_uri())
            if pictures is not None:
                stem = pictures / f"{path.stem}-{width}-{scheme}"
                page.screenshot(path=f"{stem}.png")
                page.screenshot(path=f"{stem}-whole.png", full_page=True)
            page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
            for what, script in (
                ("scrolls sideways", _SIDEWAYS),
                ("faint", _FAINT),
                ("scrolls out of a keyboard's reach", _UNREACHABLE),
                ("small for a finger", _SMALL),
                ("picture does not show", _UNSEEN),
            ):
                if found := page.evaluate(script):
                    wrong.append(f"{where}: {what}: {found}")
            context.close()
    wrong += _sorting(browser, path)
    wrong += _without_scripts(browser, path)
    return wrong


def _listen(page: Page, where: str, wrong: list[str]) -> None:
    page.on("console", lambda message: wrong.append(f"{where}: console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"{where}: script: {error}"))

    def asked(request: Any) -> None:
        if not request.url.startswith(("data:", "file:")) or (
            request.url.startswith("file:") and not request.is_navigation_request()
        ):
            wrong.append(f"{where}: asks for {request.url[:80]}")

    page.on("request", asked)


def _sorting(browser: Browser, path: Path) -> list[str]:
    """A click on a heading sorts its table upwards, a second one downwards: by the value that a cell
    names, or else by the number it begins with."""
    page = browser.new_page()
    page.goto(path.resolve().as_uri())
    return page.evaluate(
        """() => {
          document.querySelectorAll("details").forEach((d) => { d.open = true; });
          const wrong = [];
          for (const table of document.querySelectorAll("table.sortable")) {
            const rows = () => [...table.tBodies[0].rows];
            const value = (cell) => parseFloat(
              cell.dataset.value ?? cell.textContent.trim().replace(/,/g, ""));
            const before = new Set(rows());
            const buttons = [...table.querySelectorAll("thead button")];
            if (!buttons.length && before.size > 1) wrong.push("no button: " + table.caption.textContent);
            buttons.forEach((button, column) => {
              for (const sign of [1, -1]) {
                button.click();
                const found = rows().map((r) => value(r.cells[column])).filter((v) => !Number.isNaN(v));
                if (found.some((v, i) => i && sign * (found[i - 1] - v) > 0)
                    || rows().length !== before.size || rows().some((r) => !before.has(r)))
                  wrong.push(`not sorted (${sign}) by ${button.textContent}: ${table.caption.textContent}`);
              }
            });
          }
          return wrong;
        }"""
    )


def _without_scripts(browser: Browser, path: Path) -> list[str]:
    """The page has its text without scripts, and prints on paper without being cut."""
    texts = []
    for scripts in (True, False):
        context = browser.new_context(java_script_enabled=scripts)
        page = context.new_page()
        page.goto(path.resolve().as_uri())
        texts.append(page.locator("body").inner_text())
        context.close()
    wrong = [] if texts[0] == texts[1] else [f"{path.name}: other text without scripts"]
    page = browser.new_page(viewport={"width": 794, "height": 1123})  # A4 at 96 dpi
    page.emulate_media(media="print")
    page.goto(path.resolve().as_uri())
    cut = page.evaluate(
        "() => [...document.querySelectorAll('.scroll, pre')].filter((e) => "
        "e.checkVisibility() && e.scrollHeight > e.clientHeight + 1 "
        "&& getComputedStyle(e).overflowY !== 'visible').length"
    )
    return wrong + ([f"{path.name}: {cut} box(es) cut in print"] if cut else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pages", nargs="+", type=Path)
    parser.add_argument("--pictures", type=Path, help="write a screenshot of each into this folder")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="Chromium's program")
    args = parser.parse_args()
    if args.browser is None:
        parser.error("no chromium in PATH; install it, or name one with --browser")
    if args.pictures is not None:
        args.pictures.mkdir(parents=True, exist_ok=True)
    wrong = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser)
        for path in args.pages:
            found = check(browser, path, args.pictures)
            wrong += found
            print(f"{path}: {path.stat().st_size:,} bytes, {len(found)} thing(s) wrong")
        print(f"Chromium {browser.version}")
        browser.close()
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
