"""One session in a process of its own, so that the peak memory is that of this session only.

test_collect.py starts it. It reads lines from standard input, "on" or "off". For each it runs the
chunks with the hook on or off, and answers with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from imatrix.native import engine


def peak() -> int:
    """The peak of this process's resident bytes; 0 if the kernel does not say."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main(work: dict[str, Any]) -> None:
    n_ctx, n_chunks = work["n_ctx"], work["n_chunks"]
    model = engine.Model(
        work["model"],
        mtp=work["mtp"],
        n_gpu_layers=work.get("n_gpu_layers", -1),
        use_mmap=True,
        check_tensors=False,
    )
    session = engine.Session(model, model if work["mtp"] else None)
    session.open(
        n_ctx=n_ctx,
        n_batch=n_ctx,
        n_ubatch=min(n_ctx, work["n_ubatch"]),
        n_seq=1,
        n_threads=work["n_threads"],
        mtp=work["mtp"],
        process_output=False,
        perplexity=work["perplexity"],
        device_sums=work.get("device_sums", True),
    )
    tokens = model.tokenize(Path(work["text"]).read_text(), add_special=True, parse_special=False)
    repeats = -(-n_ctx // len(tokens))  # the text may be shorter than a chunk
    chunks = np.tile(tokens, repeats)[: len(tokens) * repeats // n_ctx * n_ctx].reshape(-1, n_ctx)
    lengths = np.array([n_ctx], np.int32)
    n = 0

    def run(times: int) -> float:
        nonlocal n
        started = time.perf_counter()
        for _ in range(times):
            session.step(np.ascontiguousarray(chunks[n % len(chunks)]), lengths)
            n += 1
        return (time.perf_counter() - started) / times

    run(1)  # the first graph is not measured
    rows = n_ctx  # how many every weight of the trunk must have seen
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        on = line.strip() == "on"
        session.set_hook_enabled(on)
        before = dict(session.counters)
        seconds = run(n_chunks)
        rows += n_chunks * n_ctx if on else 0
        after = session.counters
        # check that the measured run was right
        snapshot = session.snapshot()
        _, counts, _ = snapshot["blk.0.ffn_up.weight"]
        assert counts.tolist() == [rows], (counts, rows)
        assert any(".nextn.eh_proj." in name for name in snapshot) == work["mtp"]
        answer = {
            "seconds": seconds,
            "peak": peak(),
            **{name: (after[name] - before[name]) // n_chunks for name in after},  # type: ignore[literal-required]
        }
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
