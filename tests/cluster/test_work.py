"""What travels between a cluster's machines, and what unpacks it there."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from imatrix.cluster.work import Block, add_parts
from imatrix.errors import NonFiniteError

UNPACKS = """
import pickle, sys
from imatrix.cluster.work import Work
from imatrix.engine.placement import Placement
from imatrix.engine.settings import Batch, ModelOptions, SessionSettings
import imatrix.cluster.worker
work = Work(
    owner="me",
    model=ModelOptions(model="$HERE/model.gguf", placement=Placement(devices=("CUDA0",))),
    session=SessionSettings(n_ctx=32, batch=Batch(1, 32, 32), n_threads=1, mtp=True),
    n_threads=None,
    identity=(("collector", "imatrix 1"),),
)
assert pickle.loads(pickle.dumps(work)) == work
print(*(name for name in sys.modules if name.startswith("imatrix.native")))
print(*(name for name in sys.modules if name.startswith("imatrix.collect")))
"""


def test_a_scheduler_needs_nothing_native() -> None:
    """It unpacks what it passes on, on a machine that may have neither the engine nor a model."""
    done = subprocess.run([sys.executable, "-c", UNPACKS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n\n", "")


def test_parts_are_added_in_the_order_of_the_text() -> None:
    def part(sums: float, score: float | None, machine: str) -> Block:
        error = NonFiniteError("a", weight="w", channel=0, expert=None, chunk=None)
        return Block(
            groups=[(["w"], np.full((1, 2), sums), np.array([3]), None)],
            scores=[None if score is None else (score, score, 1)],
            nonfinite={0: error} if score is None else {},
            machines=(machine,),
            seconds=1.0,
            loading=0.5,
        )

    added = add_parts(part(1.0, 0.25, "AVX2"), part(2.0, None, "AVX2"))
    ((names, sums, counts, signed),) = added.groups
    assert (names, sums.tolist(), counts.tolist(), signed) == (["w"], [[3.0, 3.0]], [6], None)
    assert added.scores == [(0.25, 0.25, 1), None]
    assert list(added.nonfinite) == [1]  # the second chunk of what was added
    assert (added.machines, added.seconds, added.loading) == (("AVX2",), 2.0, 1.0)
    refusal = ValueError("no")
    assert add_parts(part(1.0, 0.0, "AVX2"), Block(refusal=refusal)).refusal is refusal
