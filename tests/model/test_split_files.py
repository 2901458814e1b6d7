"""A head in a file of its own: Collector(trunk, mtp_model=head) compared with the bundled model.

extract_mtp makes the halves from a forged model, for every architecture with an MTP graph. Runs are
in processes of their own, because the engine ends the process if one of its assertions fails.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.forge_any import MTP_ARCHS, AnyModel, make_any
from helpers.ggufs import rewritten
from helpers.measured import SEVERAL, child

from imatrix import Collector, ModelError, extract_mtp

pytestmark = [
    pytest.mark.engine(
        "src/llama-model.cpp", "a file without block 0 is loaded as a head alone (nextn_flags)"
    ),
]

N_CTX = 136  # more than a block of deepseek4's longest compression, 128

_SAME = """
import json, sys
import numpy as np
from imatrix import Collector

n_ctx, bundled, *pairs = json.loads(sys.argv[1])
tokens = np.random.default_rng(0).integers(0, 250, (2, n_ctx)).tolist()

def collect(model, head):
    with Collector(model, mtp_model=head, n_ctx=n_ctx, n_ubatch=96, n_threads=1) as collector:
        about = collector.n_trunk, collector.n_nextn
        plan = collector.plan(mtp=True)
        return about, plan, collector.run(tokens, mtp=True)

about, plan, one = collect(bundled, None)
for trunk, head in pairs:
    about_split, plan_split, split = collect(trunk, head)
    different = [
        name for name, entry in one.items()
        if name not in split
        or entry.sums.tobytes() != split[name].sums.tobytes()
        or entry.counts.tobytes() != split[name].counts.tobytes()
    ]
    print(json.dumps({
        "about": about == about_split,
        "plan": (plan.trunk, plan.head, sorted(plan.never), plan.head_outputs)
        == (plan_split.trunk, plan_split.head, sorted(plan_split.never), plan_split.head_outputs),
        "names": sorted(one) == sorted(split),
        "different": different,
        "head_entries": sum(
            name.startswith("blk.") and int(name.split(".")[1]) >= about[0] for name in one
        ),
    }))
"""


def check_same(bundled: Path, *pairs: tuple[Path, Path]) -> None:
    """Each pair of trunk and head gives what the bundled model gives."""
    names = [[str(trunk), str(head)] for trunk, head in pairs]
    lines = child(_SAME, json.dumps([N_CTX, str(bundled), *names])).splitlines()
    assert len(lines) == len(pairs)
    for line in lines:
        found = json.loads(line)
        assert found.pop("head_entries") > 0
        assert found == {"about": True, "plan": True, "names": True, "different": []}


def halves(folder: Path, model: Path) -> tuple[Path, Path]:
    trunk, head = folder / "trunk.gguf", folder / "mtp-model.gguf"
    extract_mtp(model, head, trunk_out=trunk)
    return trunk, head


def forged_halves(folder: Path, arch: str, **options: Any) -> tuple[AnyModel, Path, Path]:
    model = make_any(folder / "model.gguf", arch, **options)
    return model, *halves(folder, model.path)


def in_parts(model: Path, tensors: int) -> Path:
    """The model in parts of so many tensors, written by gguf-py; returns the first part."""
    rewritten(model, model.with_name(f"{model.stem}-parts.gguf"), split=tensors)
    parts = sorted(model.parent.glob(f"{model.stem}-parts-?????-of-?????.gguf"))
    assert len(parts) > 2
    return parts[0]


class TestSameSums:
    @pytest.mark.parametrize("arch", MTP_ARCHS)
    def test_as_from_the_bundled_model(self, arch: str, tmp_path: Path) -> None:
        """The trunk may also be a bundled model, which claims a head: its own head is then left
        alone."""
        model, trunk, head = forged_halves(tmp_path, arch)
        check_same(model.path, (trunk, head), (model.path, head))

    @pytest.mark.parametrize("arch", SEVERAL)
    def test_with_several_heads(self, arch: str, tmp_path: Path) -> None:
        model, trunk, head = forged_halves(tmp_path, arch, n_nextn=3)
        check_same(model.path, (trunk, head))

    def test_with_tables_of_its_own(self, tmp_path: Path) -> None:
        options = {"embed_tokens": True, "shared_head_head": True}
        model, trunk, head = forged_halves(tmp_path, "qwen35", **options)
        check_same(model.path, (trunk, head))

    def test_where_the_bundled_model_is_the_head(self, tmp_path: Path) -> None:
        """A whole model is given as mtp_model: its head is taken."""
        model, trunk, _ = forged_halves(tmp_path, "glm4moe")
        check_same(model.path, (trunk, model.path))

    @pytest.mark.parametrize("arch", ["qwen35moe", "step35"])
    def test_in_parts(self, arch: str, tmp_path: Path) -> None:
        model, trunk, head = forged_halves(tmp_path, arch)
        parts = in_parts(trunk, 9), in_parts(head, 5)
        check_same(model.path, parts, (trunk, parts[1]), (parts[0], head))

    def test_bundled_in_parts(self, tmp_path: Path) -> None:
        model = make_any(tmp_path / "model.gguf", "deepseek2")
        parts = in_parts(model.path, 11)
        trunk, head = halves(tmp_path, parts)
        check_same(model.path, (trunk, head), (parts, head))

    def test_a_missing_part_is_named(self, tmp_path: Path) -> None:
        _, trunk, head = forged_halves(tmp_path, "qwen35")
        first = in_parts(head, 5)
        second = first.with_name(first.name.replace("-00001-", "-00002-"))
        second.unlink()
        with pytest.raises(ModelError, match=second.name):
            Collector(trunk, mtp_model=first)


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forged_halves(tmp_path_factory.mktemp("trunk"), "hy_v3")[1]


class TestHeadsThatDoNotFit:
    """They are refused when the Collector is made, with both values; the engine would accept most
    of them."""

    @pytest.mark.parametrize(
        ("arch", "options", "message"),
        [
            ("step35", {}, "architecture is hy_v3 in the trunk, step35 in"),
            ("hy_v3", {"n_embd": 512}, r"n_embd.* is 256 in the trunk, 512 in"),
            ("hy_v3", {"tokenizer": None}, r"vocabulary .* is \d+ in the trunk, 512 in"),
            ("hy_v3", {"n_layer": 3}, r"trunk blocks is 2 in the trunk, 3 in"),
        ],
        ids=["architecture", "n_embd", "vocabulary", "block_count"],
    )
    def test_of_another_model(
        self, trunk: Path, arch: str, options: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        _, _, head = forged_halves(tmp_path, arch, **options)
        with pytest.raises(ModelError, match=message) as error:
            Collector(trunk, mtp_model=head)
        assert str(trunk) in str(error.value)
        assert str(head) in str(error.value)

    def test_other_number_of_heads_than_the_trunk_claims(self, tmp_path: Path) -> None:
        bundled = make_any(tmp_path / "bundled.gguf", "hy_v3", n_nextn=1)
        _, _, head = forged_halves(tmp_path, "hy_v3", n_nextn=3)
        with pytest.raises(ModelError, match="nextn_predict_layers is 1 in the trunk, 3 in"):
            Collector(bundled.path, mtp_model=head)

    def test_trunk_as_the_head(self, trunk: Path) -> None:
        with pytest.raises(ModelError, match="no MTP head in it"):
            Collector(trunk, mtp_model=trunk)


_MAPPED = """
import sys
from pathlib import Path
from imatrix import Collector

trunk, head = sys.argv[1:]
tokens = [[1] * 64]
def mapped():
    return Path(head).name in Path("/proc/self/maps").read_text()

with Collector(trunk, mtp_model=head, n_ctx=64, n_threads=1, mtp=False) as collector:
    never = collector.run(tokens)
    assert not mapped(), "mtp=False loaded the head"
    try:
        collector.run(tokens, mtp=True)
    except ValueError as error:
        assert "mtp=False" in str(error), error
    else:
        raise AssertionError("it ran the head")
    assert not mapped()

with Collector(trunk, mtp_model=head, n_ctx=64, n_threads=1) as collector:
    first = collector.run(tokens)
    assert not mapped(), "a run of the trunk loaded the head"
    both = collector.run(tokens, mtp=True)
    assert mapped(), "this test sees nothing"
    again = collector.run(tokens)
    assert not mapped(), "the head stayed for a run of the trunk"
    for matrix in (first, again):
        assert sorted(matrix) == sorted(never)
        assert all((e.sums == never[n].sums).all() for n, e in matrix.items())
    assert set(never) < set(both)

with Collector(trunk, mtp_model=head, n_ctx=64, n_threads=1, mtp=True) as collector:
    assert mapped(), "mtp=True did not load the head"
assert not mapped(), "close() left the head"
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc/self/maps")
def test_head_is_loaded_for_as_long_as_it_is_wanted(tmp_path: Path) -> None:
    _, trunk, head = forged_halves(tmp_path, "qwen35")
    child(_MAPPED, trunk, head)
