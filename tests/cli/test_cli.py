"""The `imatrix` command, run in this process if that is enough, and compared with llama-imatrix."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from helpers.random_model import make_random_model
from helpers.running import TEXT, EngineTool, Run, until_printed

import imatrix
from imatrix import cli
from imatrix.collect import run as _run
from imatrix.entries import Entry
from imatrix.matrix.importance import ImportanceMatrix


def spawn(*argv: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "imatrix", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


def one_at_a_time(n_ctx: int = 64) -> list[object]:
    """Flags for one chunk a decode, two threads at most."""
    return ["-c", n_ctx, "-b", n_ctx, "-t", 1]


# --- collect: as llama-imatrix does it -----------------------------------------------------------


def theirs(tool: Path, *flags: object) -> str:
    command = [str(part) for part in (tool, *flags)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout + done.stderr


def same(ours: Path, reference: Path) -> None:
    a, b = ImportanceMatrix.load(ours), ImportanceMatrix.load(reference)
    assert list(a) == list(b)
    assert (a.chunk_count, a.chunk_size, a.datasets) == (b.chunk_count, b.chunk_size, b.datasets)
    for name in a:
        assert a[name].counts.tolist() == b[name].counts.tolist(), name
        # llama-imatrix adds float32 sums, one row after the other
        scale = b[name].sums.max()
        assert np.abs(a[name].sums - b[name].sums.reshape(a[name].sums.shape)).max() < 1e-5 * scale


@pytest.mark.parametrize(
    "flags",
    [
        ["-c", 128, "--chunks", 6],  # default batch: chunks side by side
        ["-c", 512, "-b", 512, "--chunks", 3],
        ["-c", 128, "-b", 64, "--chunks", 3],  # a chunk in two decodes
        ["-c", 128, "-b", 128, "-ub", 32, "--chunks", 3],
        ["-c", 64, "-b", 64, "--chunk", 2, "--chunks", 3],
        ["-c", 64, "-b", 64, "--from-chunk", 1, "--chunks", 2, "--process-output"],
        ["-c", 64, "-b", 64, "--chunks", 3, "--parse-special"],
    ],
)
def test_the_same_flags_give_the_same_file_and_perplexity(
    flags: list[object], model: Path, text: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    # in a process of its own, so that a flag that upsets the engine cannot end the tests
    special = tmp_path / "text.txt"
    special.write_text("<|begin|>" + text.read_text(encoding="utf-8"), encoding="utf-8")
    source = special if "--parse-special" in flags else text
    common = ["-m", model, "-f", source, "-t", 1, *flags]
    tool = engine_tool("llama-imatrix")
    log = until_printed(
        "Final estimate", lambda: theirs(tool, *common, "-o", tmp_path / "theirs.gguf")
    )
    done = spawn("collect", *common, "-o", tmp_path / "ours.gguf")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    estimate = r"Final estimate: PPL = ([\d.]+) \+/- ([\d.]+)"
    found, expected = re.search(estimate, done.stderr), re.search(estimate, log)
    assert found is not None
    assert expected is not None
    assert [float(x) for x in found.groups()] == pytest.approx(
        [float(x) for x in expected.groups()], rel=1e-4
    )


def test_earlier_files_go_in_as_there(
    model: Path, text: Path, engine_tool: EngineTool, run: Run, tmp_path: Path
) -> None:
    earlier_text = tmp_path / "earlier.txt"
    earlier_text.write_text(TEXT[20_000:23_000], encoding="utf-8")
    common = ["-m", model, *one_at_a_time(), "--chunks", 3]
    earlier = tmp_path / "earlier.gguf"
    assert run("collect", *common, "-f", earlier_text, "-o", earlier).status == 0
    more = [*common, "-f", text, "--in-file", earlier]
    theirs(engine_tool("llama-imatrix"), *more, "-o", tmp_path / "theirs.gguf")
    assert run("collect", *more, "-o", tmp_path / "ours.gguf").status == 0
    same(tmp_path / "ours.gguf", tmp_path / "theirs.gguf")
    assert ImportanceMatrix.load(tmp_path / "ours.gguf").chunk_count == 6
    # an earlier file may be the output as well
    assert run("collect", *more, "-o", earlier).status == 0
    same(earlier, tmp_path / "theirs.gguf")


def test_earlier_files_with_commas(
    head_matrix: Path, engine_tool: EngineTool, run: Run, tmp_path: Path
) -> None:
    trunk = tmp_path / "trunk, alone.gguf"
    ImportanceMatrix.load(head_matrix).trunk.save(trunk)
    flags = ["-c", 64, "--in-file", f'{head_matrix},"{trunk}"']
    theirs(engine_tool("llama-imatrix"), "-m", "none", *flags, "-o", tmp_path / "theirs.gguf")
    assert run("collect", *flags, "--in-file", trunk, "-o", tmp_path / "ours.gguf").status == 0
    once = ImportanceMatrix.load(trunk)
    expected = ImportanceMatrix.load(tmp_path / "theirs.gguf").merge(once)
    found = ImportanceMatrix.load(tmp_path / "ours.gguf")
    assert set(found) == set(expected)
    for name in found:
        assert found[name].counts.tolist() == expected[name].counts.tolist(), name
        np.testing.assert_allclose(  # llama-imatrix rounds once more to float32
            found[name].sums, expected[name].sums.reshape(found[name].sums.shape), rtol=3e-7
        )


def test_the_old_format(model: Path, text: Path, engine_tool: EngineTool, run: Run,
                        tmp_path: Path) -> None:  # fmt: skip
    common = ["-m", model, "-f", text, *one_at_a_time(), "--chunks", 3, "--no-ppl"]
    old, new, theirs = (tmp_path / name for name in ("old", "new.gguf", "theirs.dat"))
    assert run("collect", *common, "-o", old, "--output-format", "dat").status == 0
    assert run("collect", *common, "-o", new).status == 0
    command = ["-m", "none", "-c", 64, "--in-file", new, "-o", theirs, "--output-format", "dat"]
    subprocess.run(
        [str(part) for part in (engine_tool("llama-imatrix"), *command)],
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    assert old.read_bytes() == theirs.read_bytes()
    done = run("convert", new, tmp_path / "mine.dat")
    assert done.status == 0
    assert f"wrote {tmp_path / 'mine.dat'}: dat, 29 weights" in done.err
    assert (tmp_path / "mine.dat").read_bytes() == theirs.read_bytes()
    assert ": .dat importance matrix, 29 weights" in run("show", old).out
    done = run("convert", new, new)
    assert done.status == 2
    assert "would replace the input" in done.err


def test_merged_in_any_order(head_matrix: Path, run: Run, tmp_path: Path) -> None:
    half = ImportanceMatrix.load(head_matrix).trunk
    files = [head_matrix]
    for number, size in ((1, 64), (2, 32)):
        path = tmp_path / f"{number}.gguf"
        ImportanceMatrix(
            {n: Entry(e.sums / (7 * number), e.counts) for n, e in half.items()},
            datasets=[f"{9 - number}.txt"], chunk_count=number, chunk_size=size,
        ).save(path)  # fmt: skip
        files.append(path)
    outs = []
    for number, order in enumerate(([0, 1, 2], [2, 1, 0], [1, 0, 2])):
        outs.append(tmp_path / f"out{number}.gguf")
        done = run("merge", *(files[i] for i in order), "-o", outs[-1])
        assert done.status == 0
        assert f"wrote {outs[-1]}: gguf, 3 file(s), 41 weights: 29 trunk, 12 head" in done.err
    assert len({path.read_bytes() for path in outs}) == 1
    assert run("merge", files[0], files[1], "-o", files[0]).status == 2


def test_what_the_old_format_cannot_hold_is_reported(run: Run, tmp_path: Path) -> None:
    entries = {
        "blk.0.ffn_up_exps.weight": Entry(np.ones((3, 4)), [0, 5, 0]),
        "blk.1.ffn_up_exps.weight": Entry(np.zeros((3, 4)), [0, 0, 0]),
    }
    ImportanceMatrix(entries, chunk_count=1, chunk_size=8).save(tmp_path / "m.gguf")
    done = run("convert", tmp_path / "m.gguf", tmp_path / "m.dat")
    assert done.status == 0
    assert "left out, having seen no rows: blk.1.ffn_up_exps.weight" in done.err
    assert "2 experts of 1 weights saw no rows; .dat cannot say so" in done.err


def test_earlier_files_alone_are_combined_without_a_model(
    head_matrix: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "both.gguf"
    done = run("collect", "--in-file", head_matrix, "--in-file", head_matrix, "-o", out)
    assert done.status == 0
    assert f"combined 2 file(s) into {out}\n41 weights: 29 trunk, 12 head (block 3); 8" in done.err
    one, both = ImportanceMatrix.load(head_matrix), ImportanceMatrix.load(out)
    assert both["blk.3.attn_q.weight"].counts.tolist() == [2 * 4 * 63]  # without slot 0
    assert np.allclose(both["blk.3.attn_q.weight"].sums, 2 * one["blk.3.attn_q.weight"].sums)


def test_the_head_too(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    done = run(
        "collect", "-m", model, "-f", text, "-o", out, "-c", 64, "--mtp", "--chunks", 5, "--no-ppl"
    )
    assert done.status == 0
    matrix = ImportanceMatrix.load(out)
    assert len(matrix.head) == 12
    assert {int(entry.counts.max()) for entry in matrix.head.values() if entry.n_counts == 1} == {
        5 * 63  # slot 0 of a chunk fills the head's cache and is not counted
    }
    assert matrix.datasets == (str(text),)
    assert done.out == ""
    assert f"{model}: glm4moe, 3 + 1 MTP head blocks" in done.err
    assert f"wrote {out}\n41 weights: 29 trunk, 12 head (block 3); 5 chunks\n" in done.err
    assert re.search(r"320 tokens in [\d.]+ s, \d+ tokens/s\n$", done.err)
    assert "PPL" not in done.err
    assert "warning" not in done.err  # among others, the tensors that the trunk does not use
    # if the user chooses a batch and threads, only the speed changes
    again = tmp_path / "again.gguf"
    run("collect", "-m", model, "-f", text, "-o", again, "-c", 64, "--mtp", "--chunks", 5,
        "-b", 32, "-t", 0, "--no-mmap", "--check-tensors")  # fmt: skip
    other = ImportanceMatrix.load(again)
    assert all(np.allclose(matrix[n].sums, other[n].sums, rtol=1e-3) for n in matrix.trunk
               if matrix[n].n_counts == 1)  # fmt: skip


def test_a_text_on_the_command_line(model: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert run("collect", "-m", model, "-p", TEXT[:2000], "-o", out, *one_at_a_time()).status == 0
    matrix = ImportanceMatrix.load(out)
    with imatrix.Collector(model, n_ctx=64, n_threads=1) as collector:
        assert matrix.chunk_count == len(collector.tokenize(TEXT[:2000])) // 64
    assert matrix.datasets == ()


def test_lines_of_progress(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    common = ["-m", model, "-f", text, "-o", tmp_path / "out.gguf", *one_at_a_time()]
    done = run("collect", *common, "--chunks", 7, "--output-frequency", 3)
    lines = [line for line in done.err.splitlines() if line.startswith("collecting: ")]
    assert [line.split(",")[0] for line in lines] == [
        f"collecting: chunk {n}/7" for n in (1, 3, 6, 7)
    ]
    pattern = r"collecting: chunk 3/7, \d+ tokens/s, ETA \d+:\d\d, PPL \d+\.\d{4}"
    assert re.fullmatch(pattern, lines[1])


def test_a_bar_on_a_terminal(
    model: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # with this, rich takes the stream for a terminal
    common = ["-m", model, "-f", text, "-o", tmp_path / "out.gguf", *one_at_a_time()]
    done = run("collect", *common, "--chunks", 7)
    assert done.status == 0
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in done.err
    assert "chunk 7/7" in done.err
    assert "collecting: " not in done.err


def test_files_along_the_way(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    common = ["-m", model, "-f", text, *one_at_a_time(), "--no-ppl"]
    run("collect", *common, "-o", out, "--chunks", 5, "--save-frequency", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.gguf", "out.gguf.at_2", "out.gguf.at_4"
    ]  # fmt: skip
    assert ImportanceMatrix.load(tmp_path / "out.gguf.at_2").chunk_count == 2
    run("collect", *common, "-o", tmp_path / "four.gguf", "--chunks", 4)
    four = ImportanceMatrix.load(tmp_path / "four.gguf")
    assert ImportanceMatrix.load(tmp_path / "out.gguf.at_4") == four
    # counting continues from that of earlier files
    run("collect", *common, "-o", out, "--chunks", 2, "--save-frequency", 3, "--in-file", out)
    assert ImportanceMatrix.load(tmp_path / "out.gguf.at_6").chunk_count == 6


def test_the_file_is_written_every_so_often(
    model: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[tuple[str, int]] = []
    save = ImportanceMatrix.save

    def counting(self: ImportanceMatrix, path: Any, **options: Any) -> None:
        saved.append((Path(path).name, self.chunk_count))
        save(self, path, **options)

    monkeypatch.setattr(ImportanceMatrix, "save", counting)
    common = ["-m", model, "-f", text, "-o", tmp_path / "o", *one_at_a_time(), "--chunks", 5]
    run("collect", *common, "-ofreq", 2)
    assert saved == [("o", 2), ("o", 4), ("o", 5)]
    saved.clear()
    run("collect", *common, "-ofreq", 0)
    assert saved == [("o", 5)]


def test_a_copy_that_fails_does_not_end_the_run(
    model: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    (tmp_path / "out.gguf.at_2").mkdir()
    common = ["-m", model, "-f", text, "-o", out, *one_at_a_time(), "--chunks", 3]
    done = run("collect", *common, "--save-frequency", 2)
    assert done.status == 0
    assert f"warning: cannot write {out}.at_2 yet: " in done.err
    assert "it is a folder" in done.err
    assert ImportanceMatrix.load(out).chunk_count == 3


def test_a_model_without_a_head(text: Path, run: Run, tmp_path: Path) -> None:
    plain = tmp_path / "plain.gguf"
    make_random_model(plain, mtp=False)
    done = run("collect", "-m", plain, "-f", text, "-o", tmp_path / "o", "-c", 64, "--mtp",
               "--chunks", 1)  # fmt: skip
    assert done.status == 0
    assert (
        "warning: plain.gguf (glm4moe) has no MTP head (nextn_predict_layers is absent or 0): "
        "collecting the trunk only\n"
    ) in done.err
    assert "29 weights: 29 trunk, 0 head" in done.err


def test_experts_without_rows(run: Run, tmp_path: Path) -> None:
    entries = {
        f"blk.{block}.ffn_{kind}_exps.weight": Entry(np.ones((6, 4)), counts)
        for block, counts in ((1, [0, 5, 9, 9, 9, 9]), (2, [0, 0, 0, 0, 7, 3]))
        for kind in ("up", "down")
    }
    ImportanceMatrix(entries, chunk_count=1, chunk_size=8).save(tmp_path / "thin.gguf")
    done = run("collect", "--in-file", tmp_path / "thin.gguf", "-o", tmp_path / "o")
    assert done.status == 0
    assert (
        "warning: experts: 12 in 2 blocks: 5 saw no rows (blk.1 expert 0, blk.2 expert 0, blk.2 "
        "expert 1, blk.2 expert 2 and 1 more); thinnest: blk.2 expert 5, 3 rows. A quantizer "
        "weighs every column of an expert without rows the same; more or other text may reach it."
    ) in done.err


def test_the_engines_log_on_request(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    common = ["-m", model, "-f", text, "-o", tmp_path / "o", *one_at_a_time(), "--chunks", 1]
    assert "llama_model_loader" not in run("collect", *common).err
    done = run("collect", *common, "-v")
    assert done.status == 0
    assert "llama_model_loader: - kv" in done.err
    assert done.out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_ctrl_c_saves_what_there_is(model: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 40, encoding="utf-8")
    out = tmp_path / "out.gguf"
    command = [
        sys.executable, "-m", "imatrix", "collect", "-m", str(model), "-f", str(long),
        "-o", str(out), "-c", "64", "--mtp", "-ofreq", "0",
    ]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("collecting: chunk 1/"):
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    matrix = ImportanceMatrix.load(out)
    assert matrix.chunk_count >= 1
    assert len(matrix.head) == 12
    checkpoint = tmp_path / "out.gguf.checkpoint"
    assert (
        f"saved what was collected so far to {out}: {matrix.chunk_count} chunk(s); run the same "
        f"command again to go on from {checkpoint}\n"
    ) in rest
    assert rest.endswith("error: interrupted\n")
    assert "Traceback" not in rest
    assert sorted(tmp_path.iterdir()) == [long, out, checkpoint]


def test_ctrl_c_before_the_first_chunk(
    model: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_kw: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(imatrix.Collector, "run", interrupted)
    out = tmp_path / "out.gguf"
    done = run("collect", "-m", model, "-f", text, "-o", out, *one_at_a_time())
    assert done.status == 130
    assert f"no chunk was finished; {out} is not written\nerror: interrupted\n" in done.err
    assert list(tmp_path.iterdir()) == []


# --- collect: going on ---------------------------------------------------------------------------


def interrupting(monkeypatch: pytest.MonkeyPatch, chunks: int, signal_: int) -> None:
    """Send this process a signal when a run has so many chunks."""
    collect = _run.Run.collect

    def and_signal(self: _run.Run, *args: Any) -> None:
        collect(self, *args)
        if self.chunks == chunks:
            signal.raise_signal(signal_)

    monkeypatch.setattr(_run.Run, "collect", and_signal)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_same_command_goes_on(
    number: int, status: int, model: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    checkpoint = tmp_path / "out.gguf.checkpoint"
    common = ["-m", model, "-f", text, *one_at_a_time(), "--mtp", "--chunks", 8, "-ofreq", 3]
    assert run("collect", *common, "-o", whole).status == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, 4, number)
        done = run("collect", *common, "-o", out)
    assert done.status == status
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    there = ImportanceMatrix.load(out).chunk_count
    assert 4 <= there < 8
    assert checkpoint.exists()
    done = run("collect", *common, "-o", out)
    assert done.status == 0
    assert f"going on from {checkpoint}: {there} of 8 chunk(s) are done" in done.err
    assert out.read_bytes() == whole.read_bytes()
    estimate = re.search(r"Final estimate: .*", done.err)
    assert estimate is not None
    assert estimate[0] in run("collect", *common, "-o", whole).err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "whole.gguf"]


def test_restart(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    checkpoint = tmp_path / "out.gguf.checkpoint"
    common = ["-m", model, "-f", text, "-o", out, *one_at_a_time(), "--chunks", 4]
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, 2, signal.SIGINT)
        assert run("collect", *common).status == 130
    done = run("collect", *common, "--process-output")
    assert done.status == 2
    assert "process_output is False there and True here" in done.err
    assert "--restart" in done.err
    assert checkpoint.exists()
    done = run("collect", *common, "--process-output", "--restart")
    assert done.status == 0
    assert "going on" not in done.err
    assert not checkpoint.exists()
    assert "output.weight" in ImportanceMatrix.load(out)


def test_an_input_that_is_the_output_too_counts_once(
    model: Path, text: Path, run: Run, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    common = ["-m", model, "-f", text, *one_at_a_time(), "--chunks", 4, "-ofreq", 1]
    run("collect", *common, "-o", whole)
    out.write_bytes(whole.read_bytes())
    earlier = out.read_bytes()
    run("collect", *common, "-o", whole, "--in-file", whole)
    common += ["-o", out, "--in-file", out]
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, 2, signal.SIGINT)
        done = run("collect", *common)
    assert done.status == 130
    assert f"{out} stays as it was, being an input too; run the same command again" in done.err
    assert out.read_bytes() == earlier
    assert run("collect", *common).status == 0
    assert out.read_bytes() == whole.read_bytes()


def test_a_nan_can_be_left_out(poisoned: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    model, text = poisoned
    out = tmp_path / "out.gguf"
    common = ["-m", model, "-f", text, "-o", out, *one_at_a_time()]
    done = run("collect", *common)
    assert done.status == 1
    assert "--on-nonfinite skip" in done.err
    before = ImportanceMatrix.load(out).chunk_count
    done = run("collect", *common, "--on-nonfinite", "skip")
    assert done.status == 0
    assert f"going on from {out}.checkpoint: {before} of " in done.err
    assert f"warning: left out for NaN or infinite activations: chunk {before} (from" in done.err
    matrix = ImportanceMatrix.load(out)
    assert matrix.chunk_count > before
    assert matrix.provenance is not None
    assert [one.chunk for one in matrix.provenance.left_out] == [before]
    assert re.search(rf"left out +1 chunk with NaN .*: {before} \(blk", run("show", out).out)
    told = json.loads(run("show", out, "--json").out)["provenance"]["left_out"]
    assert [one["chunk"] for one in told] == [before]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_signals_once_and_twice(model: Path, tmp_path: Path) -> None:
    """The second one ends the run while it waits for the chunk or saves."""
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 40, encoding="utf-8")
    out = tmp_path / "out.gguf"
    # saving takes its time
    script = """
        import sys, time
        from imatrix import cli, ImportanceMatrix
        from imatrix.formats import checkpoint
        def slow(*_):
            print("saving", file=sys.stderr, flush=True)
            time.sleep(60)
        checkpoint.write = slow
        sys.exit(cli.main(sys.argv[1:]))
    """
    command = [
        sys.executable, "-c", textwrap.dedent(script), "collect", "-m", str(model), "-f",
        str(long), "-o", str(out), "-c", "64", "-ofreq", "0",
    ]  # fmt: skip
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("collecting: chunk "):
                    process.send_signal(number)
                elif line == "saving\n":
                    process.send_signal(number)
                    break
            assert process.wait(30) == status


@pytest.mark.skipif(sys.platform != "linux", reason="finds the process in /proc")
@pytest.mark.parametrize(
    ("number", "says"),
    [
        (signal.SIGABRT, "SIGABRT"),
        (signal.SIGKILL, "killed (SIGKILL), as the system does where memory runs out"),
    ],
)
def test_the_engine_has_a_process_of_its_own(
    number: int, says: str, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    long = tmp_path / "long.txt"
    long.write_text(TEXT * 40, encoding="utf-8")
    common = [*one_at_a_time(), "-ofreq", 1, "-m", model]
    command = [sys.executable, "-m", "imatrix", "collect", *common, "-f", long, "-o", out]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("collecting: chunk 3"):
                break
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(children) == 1
        os.kill(int(children[0]), number)
        rest = process.stderr.read()
        assert process.wait(60) == 1
    # during the chunk, or while its sums were fetched
    found = re.search(
        r", (?:in|before) chunk (\d+)\. (\S+) holds (\d+) chunk\(s\) and is 0:00:\d\d old", rest
    )
    assert f"error: the process that ran the engine is gone: {says}, " in rest
    assert "run the same again to go on from it" in rest
    assert "Traceback" not in rest
    assert found is not None
    assert found[2] == f"{out}.checkpoint"
    assert int(found[1]) >= int(found[3]) >= 3
    assert ImportanceMatrix.load(out).chunk_count == int(found[3])


def test_the_same_bytes_if_the_engine_has_no_process_of_its_own(
    model: Path, text: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole.gguf"
    common = [*one_at_a_time(), "-ofreq", 1, "-m", model]
    done = spawn("collect", *common, "-f", text, "-o", whole, "--chunks", 2)
    assert (done.returncode, ImportanceMatrix.load(whole).chunk_count) == (0, 2)
    expected = whole.read_bytes()
    done = spawn("collect", *common, "--no-isolate", "-f", text, "-o", whole, "--chunks", 2)
    assert done.returncode == 0
    assert whole.read_bytes() == expected
    assert spawn("collect", *common, "-f", tmp_path / "none", "-o", whole).returncode == 2


def test_an_output_that_was_written_is_not_added_to_again(
    model: Path, text: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ended after it wrote an output that is also an input, and before it removed the
    checkpoint."""
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    checkpoint = tmp_path / "out.gguf.checkpoint"
    common = ["-m", model, "-f", text, *one_at_a_time(), "--chunks", 2, "-ofreq", 1]
    run("collect", *common, "-o", out)
    run("collect", *common, "-o", whole, "--in-file", out)
    common += ["-o", out, "--in-file", out]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_args, **_kw: None)
        assert run("collect", *common).status == 0
    assert checkpoint.exists()
    assert out.read_bytes() == whole.read_bytes()
    done = run("collect", *common)
    assert done.status == 0
    assert f"{out} is done: the run before this one was ended between" in done.err
    assert out.read_bytes() == whole.read_bytes()
    assert not checkpoint.exists()
    # the next command adds to it, as it is told to
    assert run("collect", *common).status == 0
    assert ImportanceMatrix.load(out).chunk_count == 6


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_one_run_an_output(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    from imatrix.files.lock import locked

    out = tmp_path / "out.gguf"
    link = tmp_path / "link.gguf"
    link.symlink_to(out)
    common = ["-m", model, "-f", text, *one_at_a_time(), "--chunks", 1]
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from imatrix.files.lock import locked\n"
            "with locked(sys.argv[1]): print('held', flush=True); sys.stdin.read()",
            str(out),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        for name in (out, link):
            done = run("collect", *common, "-o", name)
            assert done.status == 2
            assert (
                f"error: process {holder.pid} is writing {name} (it holds {out}.lock)" in done.err
            )
        assert not out.exists()
        assert run("collect", *common, "-o", tmp_path / "other.gguf").status == 0
        # a killed run left it: its lock goes with the process
        holder.kill()
    assert (tmp_path / "out.gguf.lock").exists()
    (tmp_path / ".out.gguf.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".out.gguf.checkpoint.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / ".not.gguf.0123456789abcdef.tmp").write_bytes(b"half")
    assert run("collect", *common, "-o", out).status == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".not.gguf.0123456789abcdef.tmp", "link.gguf", "other.gguf", "out.gguf"
    ]  # fmt: skip
    with locked(out):
        pass


# --- collect: errors -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(model: Path) -> tuple[Path, Path]:
    """A model with NaN in the embedding of one rare token, and a text that ends with it."""
    path = model.with_name("poisoned.gguf")
    path.write_bytes(model.read_bytes())
    with imatrix.Collector(model, n_ctx=64) as collector:
        rare = int(collector.tokenize("\N{SNOWMAN}", add_special=False)[-1])
        plain = collector.tokenize(TEXT[:1500])
    assert rare not in plain.tolist()
    embedding = next(t for t in GGUFReader(path, "r+").tensors if t.name == "token_embd.weight")
    embedding.data[rare] = np.nan
    embedding.data.base.flush()  # type: ignore[union-attr]
    text = model.with_name("poisoned.txt")
    text.write_text(TEXT[:1500] + "\N{SNOWMAN}" + TEXT[1500:3000], encoding="utf-8")
    return path, text


def test_a_nan_keeps_the_chunks_before_it(
    poisoned: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    model, text = poisoned
    out = tmp_path / "out.gguf"
    done = run("collect", "-m", model, "-f", text, "-o", out, *one_at_a_time())
    assert done.status == 1
    chunks = ImportanceMatrix.load(out).chunk_count
    assert chunks >= 2
    assert f"saved what was collected so far to {out}: {chunks} chunk(s); run the " in done.err
    assert re.search(
        rf"error: a NaN or infinite activation reached blk\.0\.attn_\w+\.weight in chunk {chunks} "
        rf"\(channel 0\)\. That chunk was discarded; the {chunks} before it are kept",
        done.err,
    )


def test_a_nan_in_the_first_chunk_leaves_no_file(
    poisoned: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    model, _ = poisoned
    out = tmp_path / "out.gguf"
    done = run("collect", "-m", model, "-p", "\N{SNOWMAN}" * 30, "-o", out, *one_at_a_time(16))
    assert done.status == 1
    assert "error: a NaN or infinite activation reached" in done.err
    assert list(tmp_path.iterdir()) == []


def test_weights_can_be_checked_while_loading(
    poisoned: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    model, text = poisoned
    done = run("collect", "-m", model, "-f", text, "-o", tmp_path / "o", "--check-tensors",
               *one_at_a_time())  # fmt: skip
    assert done.status == 2
    assert "token_embd.weight" in done.err or "invalid data" in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="no resource limits")
def test_a_full_disk_at_the_end(model: Path, text: Path, tmp_path: Path) -> None:
    script = """
        import resource, sys
        from imatrix import cli
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        sys.exit(cli.main(sys.argv[1:]))
    """
    out = tmp_path / "out.gguf"
    arguments = ["collect", "-m", model, "-f", text, "-o", out, "--chunks", 2, *one_at_a_time()]
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert f"error: cannot write {out}: " in done.stderr
    assert list(tmp_path.iterdir()) == []


def usage_error(run: Run, message: str, *argv: object) -> str:
    done = run(*argv)
    assert done.status == 2
    assert message in done.err
    assert done.out == ""
    return done.err


def test_texts_that_will_not_do(model: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    start = ["collect", "-m", model, "-o", out, *one_at_a_time()]
    nothing = "nothing to collect from: give a text with -f FILE or -p TEXT, or files to combine"
    usage_error(run, nothing, *start)
    usage_error(run, nothing, *start, "-p", "")
    missing = tmp_path / "missing.txt"
    usage_error(run, f"error: {missing}: No such file or directory", *start, "-f", missing)
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9 au lait")
    usage_error(run, "error: no tokens: the texts are empty", *start, "-f", empty)
    usage_error(run, "latin.txt: not utf-8 text: byte 0xe9 at offset 3", *start, "-f", latin)
    short = ["-p", "Alice was beginning"]
    usage_error(run, "nothing is left after skipping 1 chunks", *start, *short, "--chunk", 1)
    usage_error(run, "not allowed with argument", *start, *short, "-f", empty)
    assert not out.exists()


def test_models_that_will_not_do(
    model: Path, text: Path, head_matrix: Path, run: Run, forged: Any, tmp_path: Path
) -> None:
    rest = ["-f", text, "-o", tmp_path / "out.gguf", *one_at_a_time()]
    usage_error(run, "error: no model: give one with -m MODEL", "collect", *rest)
    missing, junk, short = (tmp_path / f"{name}.gguf" for name in ("missing", "junk", "short"))
    junk.write_bytes(b"#!/bin/sh\n" * 100)
    short.write_bytes(model.read_bytes()[:-100_000])
    for path, message in (
        (missing, f"error: {missing}: no such model file"),
        (tmp_path, f"error: {tmp_path}: expected a GGUF model file"),
        (junk, f"error: {junk}: "),
        (short, f"error: {short}: "),
        (head_matrix, "no general.architecture; this GGUF file is not a model"),
        (forged("glm4moe", tokenizer=None).path, "the model has no tokenizer"),
    ):
        usage_error(run, message, "collect", "-m", path, *rest)
    assert not (tmp_path / "out.gguf").exists()


def test_outputs_that_will_not_do(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    start = ["collect", "-m", copy, "-f", text, *one_at_a_time(), "-o"]
    nowhere = tmp_path / "nowhere" / "out.gguf"
    message = f"cannot write {nowhere}: there is no folder {nowhere.parent}; create it first"
    usage_error(run, message, *start, nowhere)
    usage_error(run, f"cannot write {tmp_path}: it is a folder", *start, tmp_path)
    usage_error(run, f"the output {copy} would replace the input {copy}", *start, copy)
    usage_error(run, f"the output {text} would replace the input {text}", *start, text)
    if sys.platform == "linux":
        usage_error(run, "/dev/full: it is not a regular file", *start, "/dev/full")
        usage_error(run, "cannot write /proc/out.gguf: /proc: ", *start, "/proc/out.gguf")
    assert copy.read_bytes() == model.read_bytes()


def test_earlier_files_that_will_not_do(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    start = ["collect", "-m", model, "-f", text, "-o", out, *one_at_a_time(), "--in-file"]
    usage_error(run, "text.txt: not a GGUF file", *start, text)
    usage_error(run, "random.gguf: it has no sums", *start, model)
    usage_error(run, "No such file or directory", *start, tmp_path / "missing.gguf")
    other = tmp_path / "other.gguf"
    ImportanceMatrix({"blk.0.x.weight": Entry(np.ones((1, 4)), [1])}).save(other)
    usage_error(run, "names no weight of", *start, other)
    ImportanceMatrix({"blk.0.attn_q.weight": Entry(np.ones((1, 4)), [1])}).save(other)
    usage_error(run, "blk.0.attn_q.weight has 4 sums, in ", *start, other)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["-c", "1"], "argument -c/--ctx-size: must be 2 or more, got 1"),
        (["-c", "many"], "argument -c/--ctx-size: expected a whole number, got 'many'"),
        (["-b", "0"], "argument -b/--batch-size: must be 1 or more, got 0"),
        (["-ub", "0"], "argument -ub/--ubatch-size: must be 1 or more, got 0"),
        (["--chunks", "0"], "argument --chunks: must be 1 or more, or -1 for all, got 0"),
        (["--chunk", "-1"], "argument --chunk/--from-chunk: must be 0 or more, got -1"),
        (["-ofreq", "-1"], "argument -ofreq/--output-frequency: must be 0 or more, got -1"),
        (["-ngl", "some"], "argument -ngl/--gpu-layers/--n-gpu-layers: expected a whole number"),
        (["--output-format", "npz"], "argument --output-format: invalid choice: 'npz'"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_flags_that_will_not_do(
    flags: Sequence[str], message: str, model: Path, text: Path, run: Run
) -> None:
    assert usage_error(run, message, "collect", "-m", model, "-f", text, *flags)


def test_flags_that_llama_imatrix_takes(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    """Long and short names, and the values that mean "all"."""
    start = ["collect", "--model", model, "--file", text, "--ctx-size", 64, "--batch-size", 64]
    more = ["--ubatch-size", 64, "--threads", -1, "--chunks", 1, "--output-format", "gguf", "--ppl"]
    out = tmp_path / "out.gguf"
    for layers in ("auto", "all", "-1", "99"):
        done = run(*start, *more, "--output-file", out, "--n-gpu-layers", layers)
        assert done.status == 0, done.err
        has_gpu = any(device.gpu for device in imatrix.backends().devices)
        assert ("there is no GPU in this build or machine" in done.err) is not has_gpu
    assert run(*start, *more, "--output", out, "--chunks", -1, "-ngl", 0).status == 0
    assert ImportanceMatrix.load(out).chunk_count > 10


def test_verbose_errors_come_with_a_traceback(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    status = cli.main(["collect", "-m", str(tmp_path / "none"), "-p", "a b", "-o",
                       str(tmp_path / "o"), "-v"])  # fmt: skip
    err = capfd.readouterr().err
    assert status == 2
    assert "Traceback" in err
    assert err.endswith("no such model file\n")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (imatrix.EngineError("the engine broke"), 1, "error: the engine broke\n"),
        (RuntimeError("odd"), 1, "error: odd\n"),
        (MemoryError("no memory for the contexts"), 1, "error: out of memory: no memory for"),
        (MemoryError(), 1, "error: out of memory\n"),
        (OSError(5, "Input/output error", "text.txt"), 1, "error: text.txt: Input/output error\n"),
        (PermissionError(13, "Permission denied", "m"), 2, "error: m: Permission denied\n"),
    ],
)
def test_errors_and_their_status(
    error: Exception,
    status: int,
    told: str,
    model: Path,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_args: object, **_kw: object) -> None:
        raise error

    monkeypatch.setattr(imatrix.Collector, "run", fail)
    done = run("collect", "-m", model, "-p", "a b c", "-o", tmp_path / "o", *one_at_a_time())
    assert done.status == status
    assert told in done.err
    assert list(tmp_path.iterdir()) == []


# --- show ----------------------------------------------------------------------------------------


def test_show_tells_the_head_from_the_trunk(head_matrix: Path, run: Run) -> None:
    done = run("show", head_matrix)
    assert done.status == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == (
        f"{head_matrix}: GGUF importance matrix, 41 weights: 29 trunk, 12 head (block 3)"
    )
    assert "  collected  4 chunks of 64 tokens" in lines
    assert any(re.match(r"  by +imatrix .*, llama\.cpp", line) for line in lines)
    assert any(re.match(r"  text +.*text\.txt$", line) for line in lines)
    assert any(line.startswith("  experts    24 in 3 blocks: ") for line in lines)
    trunk = next(i for i, line in enumerate(lines) if line.startswith("trunk "))
    head = next(i for i, line in enumerate(lines) if line.startswith("head "))
    first = next(line for line in lines[trunk:head] if line.startswith("blk.*.attn_q.weight"))
    assert first.split()[:5] == ["blk.*.attn_q.weight", "3", "256", "1", "256"]
    assert not any(line.startswith("blk.3.") for line in lines[:head])
    assert any(line.startswith("blk.3.nextn.eh_proj.weight  ") for line in lines[head:])


def test_show_all_and_json(head_matrix: Path, run: Run) -> None:
    every = run("show", head_matrix, "--all").out
    matrix = ImportanceMatrix.load(head_matrix)
    assert all(re.search(rf"^{re.escape(name)} ", every, re.MULTILINE) for name in matrix)

    data = json.loads(run("show", head_matrix, "--json").out)
    assert data["chunk_count"] == 4
    assert data["chunk_size"] == 64
    assert data["head_blocks"] == [3]
    assert data["provenance"]["mtp"] is True
    assert data["experts"]["count"] == 24
    weights = {weight["name"]: weight for weight in data["weights"]}
    assert list(weights) == list(matrix)
    for name, part in (("blk.3.nextn.eh_proj.weight", "head"), ("blk.0.ffn_up.weight", "trunk")):
        row = matrix[name].sums[0] / matrix[name].counts[0]
        assert weights[name] == {
            "name": name,
            "part": part,
            "n_in": row.size,
            "n_mat": 1,
            "rows_min": 252 if part == "head" else 256,
            "rows_max": 252 if part == "head" else 256,
            "mean": pytest.approx(row.mean()),
            "peak": pytest.approx(row.max() / row.mean()),
            "unseen": 0,
            "signed_sums": True,
        }


def test_show_leaves_out_what_saw_nothing(run: Run, tmp_path: Path) -> None:
    sums = np.array([[2.0, 6.0], [0.0, 0.0], [1.0, 0.0]])
    path = tmp_path / "thin.gguf"
    ImportanceMatrix(
        {
            "blk.7.ffn_up_exps.weight": Entry(sums, [2, 0, 1]),
            "blk.7.ffn_in.weight": Entry(np.zeros((1, 2)), [0]),
        }
    ).save(path)
    data = json.loads(run("show", path, "--json").out)
    dense, experts = data["weights"]
    # means 2 and 0.5 over two experts; peaks 3/2 and 1/0.5
    assert (experts["mean"], experts["peak"], experts["unseen"]) == (1.25, 2.0, 1)
    assert (dense["mean"], dense["peak"], dense["unseen"]) == (None, None, 1)
    assert data["experts"] == {"count": 3, "unseen": [[7, 1]], "thinnest": [7, 2, 1]}
    out = run("show", path).out
    assert "experts    3 in 1 block: 1 saw no rows (blk.7 expert 1); thinnest: blk.7" in out
    assert "no rows" in next(line for line in out.splitlines() if line.startswith("trunk"))


def test_show_a_file_of_llama_imatrix(
    model: Path, text: Path, engine_tool: EngineTool, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "theirs.gguf"
    theirs(engine_tool("llama-imatrix"), "-m", model, "-f", text, "-o", path, "--no-ppl",
           *one_at_a_time(), "--chunks", 2)  # fmt: skip
    done = run("show", path)
    assert done.status == 0
    assert "29 weights: 29 trunk, 0 head" in done.out
    assert "head  " not in done.out
    assert "  by  " not in done.out


def test_show_what_is_no_matrix(model: Path, text: Path, run: Run, tmp_path: Path) -> None:
    usage_error(run, "text.txt: not a GGUF file: it starts with", "show", text)
    usage_error(run, "it has no sums", "show", model)
    usage_error(run, "No such file or directory", "show", tmp_path / "missing.gguf")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_show_into_a_closed_pipe(head_matrix: Path) -> None:
    command = f"{sys.executable} -m imatrix show --all {head_matrix} | head -n 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""


# --- quantize ------------------------------------------------------------------------------------


def test_quantize(model: Path, head_matrix: Path, run: Run, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    done = run("quantize", model, target, "iq2_xxs", "--imatrix", head_matrix,
               "--tensor-type", "ATTN_Q=q8_0", "-t", 1)  # fmt: skip
    assert done.status == 0
    assert done.out == ""
    assert re.search(rf"wrote {target}: IQ2_XXS, \d\.\d MiB, \d\.\d\d bits per weight\n", done.err)
    types = {t.name: t.tensor_type.name for t in GGUFReader(target).tensors}
    assert types["blk.3.ffn_up_exps.weight"] == "IQ2_XXS"
    assert types["blk.3.attn_q.weight"] == "Q8_0"

    again = tmp_path / "again.gguf"
    flags = ["--pure", "--leave-output-tensor", "--allow-requantize"]
    assert run("quantize", target, again, "Q4_0", *flags).status == 0
    types = {t.name: t.tensor_type.name for t in GGUFReader(again).tensors}
    assert types["output.weight"] == "Q5_K"  # the file is as it was
    assert types["blk.3.attn_q.weight"] == "Q4_0"


def test_quantize_refused(model: Path, head_matrix: Path, run: Run, tmp_path: Path) -> None:
    trunk = tmp_path / "trunk.gguf"
    ImportanceMatrix.load(head_matrix).trunk.save(trunk)
    target = tmp_path / "q.gguf"
    done = run("quantize", model, target, "IQ2_XXS", "--imatrix", trunk)
    assert done.status == 1
    assert "Missing importance matrix for tensor blk.3.attn_q.weight" in done.err
    assert "collect it with mtp (imatrix collect --mtp)" in done.err
    for message, *argv in (
        ("unknown type 'Q9'", model, target, "Q9"),
        ("expected NAME=TYPE, as attn_q=q8_0, got 'attn_q'", model, target, "Q4_0",
         "--tensor-type", "attn_q"),
        ("unknown tensor type 'q9'", model, target, "Q4_0", "--tensor-type", "attn_q=q9"),
        (f"the output {model} would replace the input {model}", model, model, "Q4_0"),
        (f"the output {trunk} would replace the input", model, trunk, "Q4_0", "--imatrix", trunk),
        ("no such model file", tmp_path / "missing", target, "Q4_0"),
        ("create it first", model, tmp_path / "nowhere" / "q.gguf", "Q4_0"),
        ("the following arguments are required: TYPE", model, target),
    ):  # fmt: skip
        usage_error(run, message, "quantize", *argv)
    assert not target.exists()


def test_quantize_interrupted(
    model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from imatrix.cli.progress import StepProgress

    def interrupt(self: StepProgress, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(StepProgress, "__call__", interrupt)
    done = run("quantize", model, tmp_path / "q.gguf", "Q4_0")
    assert done.status == 130
    assert done.err.endswith("error: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_quantize_on_a_terminal(
    model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run("quantize", model, tmp_path / "q.gguf", "Q4_K_M")
    assert done.status == 0
    assert "tensor 58/58" in done.err


# --- the command itself --------------------------------------------------------------------------


def test_version(run: Run) -> None:
    done = run("--version")
    assert done.status == 0
    found = imatrix.backends()
    lines = done.out.splitlines()
    assert lines[0] == f"imatrix {imatrix.__version__}"
    assert lines[1] == f"engine      {found.engine}"
    assert lines[2] == f"backends    {', '.join(found.built)}"
    assert any(line.startswith("device      CPU: ") for line in lines)
    assert any(line.startswith(f"row kernel  {found.row_kernel}") for line in lines)


def test_no_arguments_and_help(run: Run) -> None:
    done = run()
    assert done.status == 2
    assert done.out == ""
    for command in ("collect", "show", "quantize", "demo"):
        assert command in done.err
        assert run(command, "--help").status == 0
    usage_error(run, "invalid choice: 'colect'", "colect")


def test_as_a_module_and_as_a_script(head_matrix: Path) -> None:
    done = spawn("show", head_matrix, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["head_blocks"] == [3]
    assert spawn().returncode == 2
    script = Path(sys.executable).with_name("imatrix")
    listed = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert listed.stdout.startswith("imatrix ")


def test_without_the_native_part(
    head_matrix: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix can be shown and combined without it; the other commands say what is missing."""

    def missing(name: str) -> Any:
        raise ImportError(f"imatrix.{name} needs the native part, which is not built here.")

    for name in ("Collector", "ModelFile", "backends", "quantize"):
        monkeypatch.delattr(imatrix, name, raising=False)
    monkeypatch.setattr(imatrix, "__getattr__", missing)
    assert run("show", head_matrix).status == 0
    assert run("collect", "--in-file", head_matrix, "-o", tmp_path / "o").status == 0
    done = run("collect", "-m", "m.gguf", "-p", "a b c", "-o", tmp_path / "o")
    assert done.status == 1
    assert "error: imatrix.Collector needs the native part" in done.err
    assert run("--version").status == 1


def test_logging_and_warnings_are_left_as_they_were(head_matrix: Path, run: Run) -> None:
    import logging

    log = logging.getLogger("imatrix.engine")
    before = (log.level, log.propagate, list(log.handlers), warnings.showwarning)
    run("show", head_matrix, "-v")
    assert (log.level, log.propagate, list(log.handlers), warnings.showwarning) == before
