"""Instructions of the row kernels and of the hook over a whole chunk, against committed figures.

    python benchmarks/instructions.py             # fails where a figure has grown by more than 5 %
    python benchmarks/instructions.py --update    # takes today's figures

A busy machine does not disturb this check: valgrind's callgrind counts instructions, not time. It
needs valgrind and `make tools`. The program that is counted, tests/native/instructions.cpp, runs the
hook over graphs that nothing computes, so the engine's own code, compiled for this processor, does
not run. valgrind 3.19 does not know AVX-512 and tells the program so, which then uses its AVX2
kernel. Figures are per element squared and depend on the compiler; the committed figures name theirs.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from helpers import engine_tools  # noqa: E402

RESULTS = Path(__file__).parent / "results"
CASES = {
    "kernel:avx2": "kernel avx2, 512 rows of 2048",
    "kernel:plain": "kernel plain, 512 rows of 2048",
    "hook:dense": "hook, a chunk of 512 tokens, 24 dense layers",
    "hook:experts": "hook, a chunk of 512 tokens, 24 layers with 64 experts, 6 used",
}
MARGIN = 1.05
CALLS = 2  # the program runs the counted code twice


def count(program: Path, case: str) -> dict[str, float] | None:
    """Instructions, elements squared, and their ratio; None if this processor lacks the kernel."""
    done = subprocess.run(
        [
            "valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null",
            "--collect-atstart=no", "--toggle-collect=imatrix_measured", program, case,
        ],
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    if done.returncode == 3:
        return None
    if done.returncode != 0:
        sys.exit(f"{case}: valgrind ended with {done.returncode}:\n{done.stderr}")
    collected = re.search(r"Collected : (\d+)", done.stderr)
    elements = re.search(r"elements (\d+)", done.stdout)
    assert collected is not None, done.stderr
    assert elements is not None, done.stdout
    instructions, squared = int(collected[1]) / CALLS, int(elements[1])
    return {
        "instructions": round(instructions),
        "elements": squared,
        "per_element": round(instructions / squared, 4),
    }


def compiler(program: Path) -> str:
    """What compiled the program, from its .comment section."""
    found = re.findall(rb"(?:GCC: \([^)]*\) [\d.]+|clang version [\d.]+)", program.read_bytes())
    return found[-1].decode() if found else "unknown"


def table(kept: dict[str, object], figures: dict[str, dict[str, float]]) -> str:
    lines = [
        "# Instructions",
        "",
        f"Compiled by {kept['compiler']}; counted by {kept['valgrind']}. Made by "
        "benchmarks/instructions.py --update, which fails without --update where a figure has "
        f"grown by more than {MARGIN - 1:.0%}.",
        "",
        "| case | instructions | elements squared | an element |",
        "|---|---|---|---|",
    ]
    for case, found in figures.items():
        lines.append(
            f"| {CASES[case]} | {found['instructions']} | {found['elements']} "
            f"| {found['per_element']:.4f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="take today's figures")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: apt install valgrind, or what your system calls it")
    program = engine_tools.find("imatrix-instructions")
    version = subprocess.run(["valgrind", "--version"], capture_output=True, text=True, check=True)
    today: dict[str, object] = {
        "compiler": compiler(program),
        "valgrind": version.stdout.strip(),
    }
    path = RESULTS / "instructions.json"
    kept = json.loads(path.read_text()) if path.is_file() else {"cases": {}}
    figures: dict[str, dict[str, float]] = {}
    failed = False
    for case in CASES:
        found = count(program, case)
        if found is None:
            continue
        figures[case] = found
        before = kept["cases"].get(case)
        line = f"{case}: {found['per_element']:.4f} instructions an element"
        if before is None:
            failed |= not args.update
            line += ", no figure is committed"
        else:
            grown = found["per_element"] / before["per_element"]
            failed |= grown > MARGIN and not args.update
            line += f", committed {before['per_element']:.4f} ({grown - 1:+.1%})"
            if found["elements"] != before["elements"]:
                failed |= not args.update
                line += f"; {found['elements']} elements, committed {before['elements']}"
        print(line, flush=True)
    if args.update:
        path.write_text(json.dumps({**today, "cases": figures}, indent=1) + "\n")
        (RESULTS / "instructions.md").write_text(table(today, figures))
    elif failed:
        if kept.get("compiler") != today["compiler"]:
            print(f"the committed figures are {kept.get('compiler')}'s, not {today['compiler']}'s")
        print("FAILED: --update takes the new figures, if they are meant")
    return failed


if __name__ == "__main__":
    sys.exit(main())
