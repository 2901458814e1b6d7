"""Makes pages for check_report.py: usual ones, one of a large model, and one with hostile names.

python tests/browser/sample_pages.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import imatrix
from imatrix import Collector, Entry, ImportanceMatrix, LeftOut, Provenance, TextSource, report_page
from imatrix.model.header import ModelFile
from imatrix.quantization.frontier import FrontierCurve, FrontierPoint
from imatrix.quantization.recipe import HeadChoice, Measured, Recipe
from imatrix.quantization.source import source_tensors

DATA = Path(imatrix.__file__).parent / "data"
MODEL = DATA / "tiny-glm4moe-mtp.gguf"


def shipped(folder: Path) -> dict[str, str]:
    """The package's model: all of it, compared with another matrix; its trunk; a .dat file."""
    with Collector(MODEL) as collector:
        whole = collector.run(DATA / "calibration.txt", mtp=True)
        other = collector.run(DATA / "held-out-prose.txt", mtp=True, max_chunks=4)
    old = folder / "whole.dat"
    whole.save(old, format="dat")
    return {
        "whole": report_page(whole, name="whole.gguf", model=MODEL, against=other),
        "recipe": report_page(
            whole, name="whole.gguf", model=MODEL, types=["Q4_K_M"], recipe=made_up_recipe()
        ),
        "trunk": report_page(
            whole.trunk, name="trunk.gguf", model=MODEL, types=["IQ2_XXS", "Q4_K_M"]
        ),
        "dat": report_page(old),
    }


def made_up_recipe() -> Recipe:
    """A recipe of the package's model with many types, a head and mixtures."""
    file = ModelFile.read(MODEL)
    source = source_tensors(file)
    kinds = ("q2_k", "iq3_xxs", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
    rng = np.random.default_rng(2)
    names = [name for name, tensor in source.items() if tensor.type == "f16"]
    types = {
        name: kinds[n]
        for name, n in zip(names, rng.integers(len(kinds), size=len(names)), strict=True)
    }
    sizes = np.arange(1_500_000, 5_000_000, 20_000)
    kl = 0.05 * np.exp((3_000_000 - sizes) / 600_000)
    points = {"IQ2_XXS": 2.0, "Q2_K": 2.3, "Q3_K_S": 2.6, "Q3_K_M": 2.9, "Q4_K_S": 3.2}
    return Recipe.for_model(
        file,
        types,
        ftype="Q3_K_M",
        bytes=3_000_000,
        predicted_kl=0.05,
        measured_kl=Measured(0.053, 0.002, 3060),
        head=HeadChoice(
            label="Q4_K", bytes=400_000, accepted=1.31, accepted_low=1.28, accepted_high=1.34,
            depth=3, speed_up=1.62,
        ),
        text="held-out.txt",
        chunks=12,
        n_ctx=512,
        frontier=FrontierCurve(
            bytes=sizes,
            kl=kl,
            measured=tuple(
                FrontierPoint(bytes=size, kl=float(np.interp(size, sizes, kl)) * 1.06, error=0.002)
                for size in (2_400_000, 3_000_000)
            ),
            mixtures=tuple(
                FrontierPoint(
                    bytes=int(1e6 * size),
                    kl=float(np.interp(1e6 * size, sizes, kl)) * 1.8,
                    error=0.003,
                    name=name,
                )
                for name, size in points.items()
            ),
            chosen=(2_400_000, 3_000_000),
        ),
    )  # fmt: skip


def large() -> str:
    """94 blocks of 20 weights, 256 experts each, many of them thin."""
    rng = np.random.default_rng(0)
    entries = {}
    for block in range(94):
        for kind in range(17):
            sums = rng.lognormal(0, 2, (1, 64)) * 9000
            entries[f"blk.{block}.kind_{kind}.weight"] = Entry(sums, [9000])
        rows = rng.poisson(rng.lognormal(4, 2, 256))
        for kind in ("gate", "up", "down"):
            sums = rng.lognormal(0, 2, (256, 32)) * rows[:, None]
            entries[f"blk.{block}.ffn_{kind}_exps.weight"] = Entry(sums, rows)
    entries["blk.93.nextn.eh_proj.weight"] = Entry(rng.lognormal(0, 2, (1, 64)), [9000])
    return report_page(ImportanceMatrix(entries, chunk_count=120, chunk_size=4096))


def hostile() -> str:
    """Names that hold scripts, names of the greatest length, and letters that run from right to
    left."""
    script = "<script>alert(1)</script>"
    rng = np.random.default_rng(1)
    names = [
        f"blk.0.{script}.weight",
        'blk.1."onload=alert(1).weight',
        "blk.2.ffn_\u202egnp.exe",
        "blk.2.وزن_الانتباه.weight",
        "--></style></title><img src=x onerror=alert(2)>",
        "\x1b[31mred\x00\uffff\n",
        "x" * 400,
    ]
    entries = {name: Entry(rng.random((1, 8)), [40]) for name in names}
    matrix = ImportanceMatrix(
        entries,
        chunk_count=2**31,
        chunk_size=2**31,
        provenance=Provenance(
            collector=script,
            engine="محرك النص 1.0",
            packing=script,
            dataset_digest='"><b>',
            left_out=(LeftOut(1, 512, script), LeftOut(3, 10**9, "blk.\u202e")),
            tokens=10**15,
            sources=(
                TextSource("/home/x/" + "very-long-" * 40 + script, 1, 5, 2),
                TextSource(
                    "نص عربي طويل من اليمين إلى اليسار (1).txt", 10**12, 10**13, 10**9, 0.25
                ),
                TextSource("", 1, 1),
            ),
        ),
    )
    return report_page(matrix, name=script + "\u202e.html", against=matrix)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in {**shipped(folder), "large": large(), "hostile": hostile()}.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
