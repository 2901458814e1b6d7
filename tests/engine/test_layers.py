"""n_gpu_layers="auto": what is chosen, for which memory, and that the engine then takes no more."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.forge import ModelSpec
from helpers.running import Forged, RpcServer

import imatrix
from imatrix import Collector, ImportanceMatrix
from imatrix.cli.flags.placement import describe_layers
from imatrix.cli.flags.values import gpu_layers
from imatrix.engine.layers import MARGIN, choose, sums_size
from imatrix.engine.placement import on_cpu
from imatrix.engine.settings import ALL, Layers
from imatrix.model.header import ModelFile
from imatrix.native import engine

needs_rpc = pytest.mark.skipif(
    "RPC" not in imatrix.backends().built, reason="the engine was built without GGML_RPC=ON"
)

MB = 10**6


# --- the rule ------------------------------------------------------------------------------------


def need(
    n_blocks: int, dense: int, experts: int = 0, compute: int = 0, n_devices: int = 1
) -> Callable[[Layers], list[engine.MemoryUse]]:
    """A model, by the bytes of a block without its experts, and the bytes of its experts. The
    output counts as a block without experts. Blocks go to the devices in equal parts, in their
    order."""

    def uses(layers: Layers) -> list[engine.MemoryUse]:
        n = n_blocks + 1 if layers.n_gpu_layers == -1 else layers.n_gpu_layers
        there = range(n_blocks + 1 - n, n_blocks + 1)
        weights = [0] * n_devices
        for place, block in enumerate(there):
            has_experts = block < n_blocks and block not in layers.cpu_experts
            weights[place * n_devices // n] += dense + (experts if has_experts else 0)
        whole = n_blocks * (dense + experts) + dense
        on_host: engine.MemoryUse = {
            "device": "CPU", "host": True, "plain": True,
            "model": whole - sum(weights), "context": 0, "compute": compute,
        }  # fmt: skip
        return [on_host] + [
            {
                "device": f"GPU{i}", "host": False, "plain": False,
                "model": model, "context": 0, "compute": compute,
            }
            for i, model in enumerate(weights)
        ]  # fmt: skip

    return uses


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (42, ALL),  # 41 * 1 MB and 1 MB of activations
        (41, Layers(40)),
        (22, Layers(21)),
        (2, Layers(1)),
        (1, Layers(0)),
        (0, Layers(0)),  # not even the activations fit, which cannot be helped
        (-900, Layers(0)),  # less than the memory to be left free
    ],
)
def test_as_many_as_there_is_room_for(free: int, expected: Layers) -> None:
    model = need(40, dense=MB, compute=MB)
    assert choose(40, model, {"GPU0": MARGIN + free * MB}, experts=False) == expected
    # a device that does not say how much memory it has takes all
    assert choose(40, model, {}, experts=False) == ALL


@pytest.mark.parametrize(
    ("free", "n_kept", "n_layers"),
    [
        (441, 0, -1),  # 41 * 1 + 40 * 10
        (440, 1, -1),
        (241, 20, -1),
        (240, 21, -1),
        (41, 40, -1),  # the model has no experts
        (40, 40, 40),
        (3, 40, 3),
    ],
)
def test_experts_stay_first(free: int, n_kept: int, n_layers: int) -> None:
    model = need(40, dense=MB, experts=10 * MB)
    found = choose(40, model, {"GPU0": MARGIN + free * MB}, experts=True)
    assert found.n_gpu_layers == n_layers
    assert len(set(found.cpu_experts)) == n_kept
    assert set(found.cpu_experts) <= set(range(40))
    # if the user has placed tensors, the experts stay with their blocks
    layers = choose(40, model, {"GPU0": MARGIN + free * MB}, experts=False)
    assert layers.cpu_experts == ()
    assert layers.n_gpu_layers == (-1 if free == 441 else (free - 1) // 11 + 1)


def test_several_devices_are_relieved_alike() -> None:
    model = need(40, dense=MB, experts=10 * MB, n_devices=2)
    # 21 and 20 layers, 20 blocks with experts on each device: 221 and 220 MB, so the experts of 10
    # blocks are too many for either
    found = choose(40, model, dict.fromkeys(("GPU0", "GPU1"), MARGIN + 122 * MB), experts=True)
    assert found.n_gpu_layers == -1
    assert len(found.cpu_experts) == 20
    assert sum(block < 20 for block in found.cpu_experts) == 10
    # one device is full: a single layer goes to the first one
    found = choose(40, model, {"GPU0": MARGIN + 999 * MB, "GPU1": MARGIN}, experts=True)
    assert found == Layers(1, tuple(range(40)))


def test_sums_take_memory_too() -> None:
    model = need(40, dense=MB)
    for sums, expected in ((0, ALL), (41, Layers(30)), (41 * 3, Layers(15))):
        free = {"GPU0": MARGIN + (41 if sums == 0 else 60) * MB}
        # each layer brings its part of the sums: 2 MB, or 4 MB
        assert choose(40, model, free, experts=False, sums=sums * MB) == expected


def test_contexts_that_cannot_be_made() -> None:
    assert choose(9, lambda _: None, {"GPU0": 0}, experts=True) == ALL


def test_the_size_of_sums(forged: Forged) -> None:
    spec = forged("glm4moe", seed=2, n_nextn=1)
    with Collector(spec.path, n_ctx=64, n_threads=1) as collector:
        tokens = np.arange(64, dtype=np.int32) % spec.hparams.n_vocab
        matrix = collector.run([tokens], mtp=True)
    least = {matrix[name].sums.tobytes(): matrix[name].sums.size for name in matrix}
    most = sum(matrix[name].sums.size for name in matrix)
    size = sums_size(ModelFile.read(spec.path))
    assert 4 * sum(least.values()) <= size
    # some weights see rows in none of this architecture's graphs
    assert 4 * most <= size <= 4 * 1.2 * most


def test_kept_on_the_cpu_by_number() -> None:
    ((pattern, buffer),) = on_cpu("experts", (1, 12))
    names = [f"blk.{i}.ffn_{kind}.weight" for i in range(22) for kind in ("up_exps", "up_shexp")]
    assert buffer == "CPU"
    assert [n for n in names if engine.find_name(pattern, [n])] == [
        "blk.1.ffn_up_exps.weight",
        "blk.12.ffn_up_exps.weight",
    ]


def test_what_is_no_number(forged: Forged) -> None:
    path = forged("llama", seed=2).path
    with pytest.raises(ValueError, match="n_gpu_layers must be a number or 'auto', got 'most'"):
        Collector(path, n_gpu_layers="most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_gpu_layers must be a number or 'auto', got 'most'"):
        imatrix.evaluate(path, ["x"], n_gpu_layers="most")  # type: ignore[arg-type]


def test_where_there_is_no_device(forged: Forged) -> None:
    spec = forged("llama", seed=2)
    with Collector(spec.path, n_ctx=64, n_threads=1, devices=[]) as collector:
        assert collector.layers is None
        collector.run([[1] * 64])
        has_gpu = any(device.gpu for device in imatrix.backends().devices)
        assert collector.layers == (ALL if has_gpu else Layers(0))  # everything may go anywhere


# --- the memory that the engine takes ------------------------------------------------------------

# the log gives sizes with two decimals, of up to ten buffers on a device
LOG_ROUNDS = 0.05 * 2**20

N_CTX = 96
SETTINGS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}
# as in test_placement.py: float32 over at most a chunk
TOLERANCE = 1e-5

# A process of its own, with the devices that the test chooses: it prints one line of JSON for each
# run, with the layers that were chosen and the engine's log.
RUN = """
import json, logging, sys
import imatrix
from imatrix.engine import models
model, head, endpoints, text, out, runs = json.loads(sys.argv[1])
lines = []
log = logging.getLogger("imatrix.engine")
log.setLevel(logging.DEBUG)
log.addHandler(type("Kept", (logging.Handler,), {"emit": lambda _, r: lines.append(r.getMessage())})())
imatrix.engine.devices.name_rpc_server(endpoints)
if not all(run["options"].get("isolate") for run in runs):
    imatrix.add_rpc_server(endpoints)
devices = models.Models._devices
for n, run in enumerate(runs):
    def limited(self):
        found = devices(self)
        for device in found:
            if device["name"] in run["free"]:
                device["memory_free"] = run["free"][device["name"]]
        return found
    models.Models._devices = limited
    lines.clear()
    with imatrix.Collector(model, mtp_model=head, **run["options"]) as collector:
        for mtp in run["mtp"]:
            collector.run([text], mtp=mtp, max_chunks=2).save(f"{out}/{n}.gguf")
        layers = collector.layers
    print(json.dumps([layers.n_gpu_layers, layers.cpu_experts, lines]))
"""


def runs_on(
    endpoints: list[str], spec: ModelSpec, text: list[int], out: Path, runs: list[dict[str, Any]],
    head: Path | None = None,
) -> list[tuple[Layers, dict[str, float]]]:  # fmt: skip
    """The layers that were chosen, and the bytes that each device then took by the engine's log."""
    for run in runs:
        run["options"] = {**SETTINGS, **run.get("options", {})}
    given = json.dumps(
        [str(spec.path), head and str(head), ",".join(endpoints), text, str(out), runs]
    )
    done = subprocess.run(
        [sys.executable, "-c", RUN, given], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    found = []
    for line in done.stdout.splitlines():
        n_layers, kept, log = json.loads(line)
        # the last load and what came after it: the plans before it log the same lines
        start = max(i for i, each in enumerate(log) if "loaded meta data" in each)
        if head is not None:
            start = sorted(i for i, each in enumerate(log) if "loaded meta data" in each)[-2]
        found.append((Layers(n_layers, tuple(kept)), taken("\n".join(log[start:]), endpoints)))
    return found


def taken(log: str, endpoints: list[str]) -> dict[str, float]:
    """Bytes by device: weights, keys and values, states, activations."""
    found: dict[str, float] = {}
    for endpoint, size in re.findall(r"RPC0\[(\S+)\] +\w+ buffer size = +([\d.]+) MiB", log):
        device = f"RPC{endpoints.index(endpoint)}"  # each server lists its own device first
        found[device] = found.get(device, 0) + float(size) * 2**20
    return found


@pytest.fixture(scope="module")
def endpoints(rpc_server: RpcServer) -> list[str]:
    return [rpc_server(0), rpc_server(1)]


def tokens(spec: ModelSpec) -> list[int]:
    return np.random.default_rng(3).integers(0, spec.tokenizer.n_vocab, 3 * N_CTX).tolist()


def on_the_cpu(spec: ModelSpec, mtp: bool) -> ImportanceMatrix:
    with Collector(spec.path, n_gpu_layers=0, **SETTINGS) as collector:
        return collector.run([tokens(spec)], mtp=mtp, max_chunks=2)


def assert_close(path: Path, want: ImportanceMatrix) -> None:
    got = ImportanceMatrix.load(path)
    assert set(got) == set(want)
    for name, entry in want.items():
        np.testing.assert_array_equal(got[name].counts, entry.counts, err_msg=name)
        apart = np.abs(got[name].sums - entry.sums).max() / entry.sums.max()
        assert apart <= TOLERANCE, name


def run_with(free: dict[str, float], mtp: tuple[bool, ...] = (True,), **options: Any) -> Any:
    """What runs_on() takes: room for this many bytes on each device."""
    room = {name: MARGIN + int(size) for name, size in free.items()}
    return {"free": room, "mtp": mtp, "options": options}


@needs_rpc
@pytest.mark.parametrize("isolate", [False, True])
def test_the_engine_takes_what_was_left_to_it(
    isolate: bool, endpoints: list[str], forged: Forged, tmp_path: Path
) -> None:
    spec = forged("qwen35", seed=2, n_nextn=1, n_layer=8)
    sums = sums_size(ModelFile.read(spec.path))
    one = {"devices": ["RPC0"], "isolate": isolate}
    ((_, all_taken),) = runs_on(
        endpoints[:1], spec, tokens(spec), tmp_path, [run_with({}, n_gpu_layers=-1, **one)]
    )
    whole = all_taken["RPC0"]
    rooms = [whole + sums + LOG_ROUNDS, 0.7 * whole, 0.4 * whole, 1000]
    runs = [run_with({"RPC0": room}, **one) for room in rooms]
    # the head comes later, and then there is room for fewer layers of the trunk
    runs += [run_with({"RPC0": 0.7 * whole}, (False, True), **one)]
    found = runs_on(endpoints[:1], spec, tokens(spec), tmp_path, runs)
    want = on_the_cpu(spec, True)
    for n, (room, (_, taken)) in enumerate(zip([*rooms, 0.7 * whole], found, strict=True)):
        assert_close(tmp_path / f"{n}.gguf", want)
        if room > 1000:
            assert 0 < taken["RPC0"] <= room + LOG_ROUNDS
    layers = [each for each, _ in found]
    assert layers[0] == ALL
    assert 10 > layers[1].n_gpu_layers > layers[2].n_gpu_layers > 0
    assert layers[3] == Layers(0)
    assert layers[4] == layers[1]
    # one more layer would have been too much
    more = [run_with({}, n_gpu_layers=each.n_gpu_layers + 1, **one) for each in layers[1:3]]
    for room, (_, taken) in zip(
        rooms[1:3], runs_on(endpoints[:1], spec, tokens(spec), tmp_path, more), strict=True
    ):
        assert taken["RPC0"] + sums + LOG_ROUNDS > room


@needs_rpc
def test_experts_on_two_devices(endpoints: list[str], forged: Forged, tmp_path: Path) -> None:
    spec = forged("glm4moe", seed=2, n_nextn=1, n_layer=6)
    sums = sums_size(ModelFile.read(spec.path))
    split = {"tensor_split": [1, 1]}
    ((_, whole),) = runs_on(
        endpoints, spec, tokens(spec), tmp_path, [run_with({}, n_gpu_layers=-1, **split)]
    )
    least = {name: 0.8 * size for name, size in whole.items()}
    found = runs_on(
        endpoints, spec, tokens(spec), tmp_path,
        [
            run_with({name: size + sums + 2**20 for name, size in whole.items()}, **split),
            run_with(least, **split),
            # only the tensors that the user keeps on the CPU stay there
            run_with(least, override_tensor=[["blk.1.ffn_up_exps", "CPU"]], **split),
        ],
    )  # fmt: skip
    for n in range(3):
        assert_close(tmp_path / f"{n}.gguf", on_the_cpu(spec, True))
    assert found[0][0] == ALL
    layers, taken = found[1]
    assert layers.n_gpu_layers == -1
    assert 0 < len(layers.cpu_experts) < 7
    assert found[2][0].cpu_experts == ()
    assert 0 < found[2][0].n_gpu_layers < 8
    for _, taken in found[1:]:
        assert set(taken) == {"RPC0", "RPC1"}
        assert all(taken[name] <= least[name] + LOG_ROUNDS for name in least)


@needs_rpc
def test_a_head_in_its_own_file(endpoints: list[str], forged: Forged, tmp_path: Path) -> None:
    spec = forged("qwen35", seed=2, n_nextn=1, n_layer=8)
    head = tmp_path / "mtp.gguf"
    imatrix.extract_mtp(spec.path, head)
    one = {"devices": ["RPC0"]}
    ((_, whole),) = runs_on(
        endpoints[:1], spec, tokens(spec), tmp_path, [run_with({}, n_gpu_layers=-1, **one)], head
    )
    room = 0.6 * whole["RPC0"]
    # the head is there from the start, or comes when the trunk is loaded already
    runs = [run_with({"RPC0": room}, mtp, **one) for mtp in ((True,), (False, True))]
    found = runs_on(endpoints[:1], spec, tokens(spec), tmp_path, runs, head)
    assert found[0] == found[1]
    assert 0 < found[0][1]["RPC0"] <= room + LOG_ROUNDS
    for n in range(2):
        assert_close(tmp_path / f"{n}.gguf", on_the_cpu(spec, True))


# Prints a line of JSON for each room: the layers of the model and of its reference, and the
# figures.
EVALUATE = """
import json, sys
import imatrix
from imatrix.engine import models
model, reference, endpoint, text, rooms = json.loads(sys.argv[1])
imatrix.add_rpc_server(endpoint)
devices, free_models = models.Models._devices, models.Models.free
chosen = []
def limited(self):
    return [{**device, "memory_free": room} for device in devices(self)]
def told(self):
    chosen.append(self.layers.n_gpu_layers)
    free_models(self)
models.Models._devices, models.Models.free = limited, told
for room in rooms:
    chosen.clear()
    found = imatrix.evaluate(
        model, [text], reference=reference, n_ctx=96, n_threads=1, depth=1, rehearse=False
    )
    # freed in the opposite order
    print(json.dumps([*chosen[::-1], found.perplexity.value, found.kl.value]))
"""


@pytest.mark.engine(
    "ggml/src/ggml-rpc/ggml-rpc.cpp", "a server that was sent every graph anew serves two models"
)
@needs_rpc
def test_a_reference_beside_the_model(endpoints: list[str], forged: Forged, tmp_path: Path) -> None:
    spec = forged("qwen35", seed=2, n_nextn=1, n_layer=8)
    model = tmp_path / "model.gguf"
    imatrix.quantize(spec.path, model, "Q8_0", n_threads=1)
    # contexts of some MB each: at least 1 MB of activations
    small, large = model.stat().st_size, spec.path.stat().st_size
    rooms = [2 * (small + large), small + large // 3, small // 2]
    given = [str(model), str(spec.path), endpoints[0], tokens(spec), [MARGIN + r for r in rooms]]
    done = subprocess.run(
        [sys.executable, "-c", EVALUATE, json.dumps(given)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    want = imatrix.evaluate(
        model, [tokens(spec)], reference=spec.path, n_ctx=96, n_threads=1, depth=1, n_gpu_layers=0
    )
    assert want.kl is not None
    for *_, perplexity, kl in found:
        assert perplexity == pytest.approx(want.perplexity.value, rel=1e-5)
        assert kl == pytest.approx(want.kl.value, rel=1e-3)  # a small difference of large numbers
    (first, other), (second, rest), (third, nothing) = (layers[:2] for layers in found)
    assert (first, other) == (-1, -1)
    # the room that the model leaves is for the reference
    assert second == -1
    assert 0 < rest < 10
    assert 0 < third < 10
    assert nothing < rest


def test_what_the_command_says() -> None:
    def described(layers: Layers | None, has_gpu: bool = True) -> str | None:
        made = SimpleNamespace(layers=layers, has_gpu=has_gpu, n_trunk=40, n_nextn=1)
        return describe_layers(made, SimpleNamespace(mtp_model=None))  # type: ignore[arg-type]

    assert described(Layers(12)) == "-ngl auto: 12 of 42 layers on the GPU"
    assert described(Layers(-1, (0, 13, 27))) == (
        "-ngl auto: all of 42 layers on the GPU, the experts of 3 blocks on the CPU"
    )
    assert described(ALL) is described(None) is described(Layers(0), has_gpu=False) is None
    assert [gpu_layers(text) for text in ("auto", "-1", "all", "-2", "0", "7")] == [
        "auto", "auto", -1, -1, 0, 7,
    ]  # fmt: skip
