"""A model on several devices: the flags have llama.cpp's syntax and meaning, and the sums are the
same.

ggml-rpc-servers on the loopback stand in for GPUs. They compute with the same CPU kernels, so that
the same model gives the same activations wherever its tensors are.
"""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.forge import Arch
from helpers.running import EngineTool, Forged, RpcServer, run_tool, until_printed

import imatrix
from imatrix import Collector, ImportanceMatrix
from imatrix.cli.flags import placement as _placement_cli
from imatrix.cli.program import build_parser
from imatrix.engine import devices
from imatrix.engine.placement import Placement
from imatrix.native import engine

pytestmark = [
    pytest.mark.engine(
        "ggml/src/ggml-rpc/ggml-rpc.cpp",
        "a server that was sent every graph anew serves several models",
    ),
]

needs_rpc = pytest.mark.skipif(
    "RPC" not in imatrix.backends().built, reason="the engine was built without GGML_RPC=ON"
)

N_CTX = 96
SETTINGS: dict[str, Any] = {"n_ctx": N_CTX, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}
# Both sides have the same activations. Sums are float32 over at most a chunk, 96 rows: each
# addition that rounds is off by some 2^-24, 6e-6 in total if all 96 are off in the same direction.
TOLERANCE = 1e-5

MODELS: list[tuple[Arch, dict[str, Any]]] = [
    ("llama", {}),
    ("qwen35", {"n_nextn": 1}),  # a recurrent layer and one with attention
    ("glm4moe", {"n_nextn": 1}),  # experts
]


def parsed(flags: str) -> dict[str, Any]:
    """What Collector takes, from flags in llama.cpp's syntax."""
    return _placement_cli.arguments(
        build_parser().parse_args(["collect", "-m", "x", *shlex.split(flags)])
    )


# --- syntax --------------------------------------------------------------------

TAKEN = [
    "-sm none", "-sm layer", "--split-mode row", "-ts 3,1", "-ts 3/1", "-ts 1,,2/3", "-ts 1,",
    "-ts .5,1e3", "--tensor-split " + ",".join("1" * 15), "-mg 1", "-mg -1", "--main-gpu 0",
    "-dev none", "-ot exps=CPU", "-ot a=CPU,b=CPU", "-ot a=CPU -ot b=CPU", "-ot =CPU",
    "--override-tensor 'blk\\.[01]\\.=CPU'", "-cmoe", "--cpu-moe", "-ncmoe 2", "-ncmoe 0",
    "--n-cpu-moe 999", "-ncffn 2", "--n-cpu-ffn 0",
]  # fmt: skip
REFUSED = [
    "-sm rows", "-sm ''", "-ts ,1", "-ts x", "-ts ''", "-ts " + ",".join("1" * 16), "-mg x",
    "-dev CPU", "-dev CUDA99", "-dev none,none", "-dev ''", "-ot exps", "-ot exps=CUDA99",
    "-ot a=CPU,", "-ot a==CPU", "-ot ''", "-ncmoe -1", "-ncmoe x", "-ncffn x",
]  # fmt: skip
# llama.cpp reads numbers up to their first other character, accepts shares that are no numbers, and
# finds a bad expression when it loads the model
STRICTER = ["-ts 3x,1", "-ts nan,1", "-ts -1,2", "-mg 1x", "-ncmoe 2x", "-ot (=CPU"]


@pytest.mark.parametrize("flags", [*TAKEN, *REFUSED, *STRICTER])
def test_flags_as_llama_imatrix_takes_them(
    flags: str, engine_tool: EngineTool, forged: Forged, capfd: pytest.CaptureFixture[str]
) -> None:
    command = [engine_tool("llama-imatrix"), "-m", "no-such-model.gguf", "-f", __file__]
    log = run_tool(*command, *shlex.split(flags), ok=False)
    theirs = "error while handling argument" not in log
    assert theirs is (flags not in REFUSED), log

    path = str(forged("llama", seed=2).path)
    try:
        placement = parsed(flags)
        placement.pop("n_gpu_layers")
        engine.Model(
            path, mtp=False, n_gpu_layers=-1, use_mmap=False, check_tensors=False, no_alloc=True,
            placement=Placement.of(**placement).as_data(),
        )  # fmt: skip
        ours = True
    except (SystemExit, ValueError):
        ours = False
    assert ours is (flags in TAKEN), capfd.readouterr().err


def test_overrides_in_the_order_of_the_command_line() -> None:
    flags = "-ot a=CPU -ncmoe 2 -ot b=CUDA0 -cmoe -ot c=CPU,d=CPU -ncffn 1"
    found = parsed(flags)["override_tensor"]
    assert [found[n][0] for n in (0, 2, 4, 5)] == ["a", "b", "c", "d"]
    assert [buffer for _, buffer in found] == ["CPU", "CPU", "CUDA0", "CPU", "CPU", "CPU", "CPU"]
    # names, and which of them match llama.cpp's own patterns for these flags (common/common.h)
    names = [
        f"blk.{block}.ffn_{kind}.weight"
        for block in (0, 1, 2, 10)
        for kind in ("up_exps", "down_chexps", "gate_up_exps", "up", "up_shexp")
    ]
    routed = [name for name in names if "exps" in name]
    in_first = [name for name in routed if name.startswith(("blk.0.", "blk.1."))]
    for n, want in ((1, in_first), (3, routed), (6, ["blk.0.ffn_up.weight"])):
        assert [name for name in names if engine.find_name(found[n][0], [name])] == want


def test_what_no_machine_has(model: Path) -> None:
    for wrong, told in (
        ({"split_mode": "rows"}, "split_mode must be one of none, layer, row, tensor"),
        ({"split_mode": "tensor"}, "leaves out sums over the devices"),
        ({"tensor_split": [1, -1]}, "shares must be 0 or more"),
        ({"tensor_split": [1, float("nan")]}, "shares must be 0 or more"),
        ({"tensor_split": [1] * 16}, "16 shares, the engine takes 15 at most"),
        ({"n_cpu_moe": -1}, "n_cpu_moe must be 0 or more"),
        ({"devices": "CUDA0"}, "devices must be a list of names"),
        ({"override_tensor": "exps=CPU"}, "pairs of a pattern and a buffer type"),
        ({"override_tensor": [("(exps", "CPU")]}, r"'\(exps' is no regular expression"),
    ):
        with pytest.raises(ValueError, match=told):
            Collector(model, **wrong)  # type: ignore[arg-type]


def test_what_finds_no_tensor(model: Path, forged: Forged) -> None:
    dense = forged("llama", seed=2).path
    for path, given, told in (
        (model, {"override_tensor": {"ffn_up": "CPU", "ffn_upp": "CPU"}}, "'ffn_upp' finds no"),
        (model, {"n_cpu_moe": 1}, "random.gguf has no experts in its first blocks"),  # 0 is dense
        (dense, {"cpu_moe": True}, f"{dense.name} has no experts: nothing is kept on the CPU"),
    ):
        with pytest.warns(UserWarning, match=re.escape(told)) as seen:
            Collector(path, **given).close()  # type: ignore[arg-type]
        assert len(seen) == 1
    found = {"n_cpu_moe": 2, "cpu_moe": True, "override_tensor": [("nextn", "CPU")]}
    Collector(model, **found).close()  # type: ignore[arg-type]


# --- several devices -------------------------------------------------------------

# A process of its own: a server that was added once is a device for every later model too. It
# prints one line of JSON for each placement: what the engine logged, or the error.
RUN = """
import json, logging, sys
import imatrix
model, endpoints, text, out, mtp, placements, settings = json.loads(sys.argv[1])
imatrix.add_rpc_server(endpoints)
lines = []
log = logging.getLogger("imatrix.engine")
log.setLevel(logging.DEBUG)
log.addHandler(type("Kept", (logging.Handler,), {"emit": lambda _, r: lines.append(r.getMessage())})())
for n, placement in enumerate(placements):
    lines.clear()
    try:
        with imatrix.Collector(model, **settings, **placement) as collector:
            collector.run([text], mtp=mtp, max_chunks=3).save(f"{out}/{n}.gguf")
    except (ValueError, RuntimeError) as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
    else:
        print(json.dumps({"log": lines}))
"""


def remote(
    endpoints: str, model: Path, text: list[int], out: Path, mtp: bool, placements: list[Any]
) -> list[dict[str, Any]]:
    given = json.dumps([str(model), endpoints, text, str(out), mtp, placements, SETTINGS])
    done = subprocess.run(
        [sys.executable, "-c", RUN, given], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def placed(log: str) -> set[str]:
    """Where the engine says that it put layers, and tensors placed by name."""
    return {
        " ".join(found[1].split())
        for found in re.finditer(r"(layer +\d+ assigned to device \w+)", log)
    } | {
        f"{found[1]} {found[2]}"
        for found in re.finditer(r"tensor (\S+) \(.* buffer type overridden to (\S+)", log)
    }


@pytest.fixture(scope="module")
def endpoints(rpc_server: RpcServer) -> list[str]:
    """Two running servers, RPC0 and RPC1."""
    return [rpc_server(0), rpc_server(1)]


@needs_rpc
@pytest.mark.parametrize(("arch", "options"), MODELS, ids=[arch for arch, _ in MODELS])
def test_the_same_sums_wherever_tensors_lie(
    arch: Arch,
    options: dict[str, Any],
    endpoints: list[str],
    forged: Forged,
    engine_tool: EngineTool,
    tmp_path: Path,
) -> None:
    spec = forged(arch, seed=2, **options)
    mtp = "n_nextn" in options
    first, second = (f"RPC0[{endpoint}]" for endpoint in endpoints)  # each server's own first
    flags = [
        "-ngl 99 -ts 1,3",
        "-ngl 2 -ts 1/1",
        "-ngl 99 -ts 0,1",
        "-ngl 99 -dev RPC1,rpc0 -ts 3,2",
        "-ngl 99 -dev RPC1",
        "-ngl 99 -dev none",
        "-ngl 99 -sm none -mg 1",
        f"-ngl 99 -ts 1,1 -ot attn_q=CPU,ffn_down={second} -ot 'blk.0.ffn_up={first}'",
    ]
    if arch == "llama":
        flags += ["-ngl 99 -ncffn 1 -ts 1,1"]
    if arch == "glm4moe":
        flags += ["-ngl 99 -ts 1,1 -cmoe", f"-ngl 99 -ncmoe 2 -ot exps={second} -cmoe -ts 1,1"]
    text = np.random.default_rng(3).integers(0, spec.tokenizer.n_vocab, 3 * N_CTX).tolist()
    with Collector(spec.path, n_gpu_layers=0, **SETTINGS) as collector:
        want = collector.run([text], mtp=mtp, max_chunks=3)
        n_trunk = collector.n_trunk
    runs = remote(",".join(endpoints), spec.path, text, tmp_path, mtp, [parsed(f) for f in flags])

    words = tmp_path / "words.txt"
    words.write_text("a b c d e f g h " * 100)
    used = []
    for n, (given, run) in enumerate(zip(flags, runs, strict=True)):
        assert "error" not in run, (given, run)
        got = ImportanceMatrix.load(tmp_path / f"{n}.gguf")
        assert set(got) == set(want)
        assert bool(got.head) is mtp
        for name, entry in want.items():
            np.testing.assert_array_equal(got[name].counts, entry.counts, err_msg=name)
            apart = np.abs(got[name].sums - entry.sums).max() / entry.sums.max()
            assert apart <= TOLERANCE, (given, name)

        # with the same flags llama-imatrix puts the same layers and tensors in the same places
        command = [
            engine_tool("llama-imatrix"), "-m", spec.path, "-f", words, "-c", "96", "-b", "96",
            "--chunks", "1", "-t", "1", "-o", tmp_path / "theirs.gguf", "-v", "-fit", "off",
            "--rpc", ",".join(endpoints), *shlex.split(given),
        ]  # fmt: skip
        theirs = placed(until_printed("~llama_context", lambda command=command: run_tool(*command)))
        ours = placed("\n".join(run["log"]))
        assert any("assigned" in line for line in theirs)
        # only this package loads the head's tensors
        assert {line for line in ours if f"blk.{n_trunk}." not in line} == theirs, given
        used.append(ours)
    both = {"layer 0 assigned to device RPC0", f"layer {n_trunk - 1} assigned to device RPC1"}
    assert used[0] >= both
    assert len(set(map(frozenset, used))) >= len(flags) - 2  # three spellings mean RPC1 alone


@needs_rpc
def test_what_these_devices_have_not(endpoints: list[str], forged: Forged, tmp_path: Path) -> None:
    spec = forged("llama", seed=2)
    wrong = {
        "there is no device 'CUDA0' to put layers on; there are: RPC0, RPC1": {
            "devices": ["RPC0", "CUDA0"]
        },
        "device 'rpc0' is named twice": {"devices": ["RPC0", "rpc0"]},
        "3 shares, but there are 2 devices here (of these: RPC0, RPC1)": {
            "tensor_split": [1, 1, 1]
        },
        "2 shares, but there is 1 device named": {"tensor_split": [1, 1], "devices": ["RPC1"]},
        "no buffer type 'RPC1' to put tensors into; there are: CPU, RPC0[127.0.0.1:": {
            "override_tensor": [["x", "RPC1"]]
        },
        "invalid value for main_gpu: 2 (available devices: 2)": {
            "split_mode": "none",
            "main_gpu": 2,
        },
        "device RPC0 does not support split buffers": {"split_mode": "row"},
    }
    runs = remote(
        ",".join(endpoints), spec.path, [1] * N_CTX, tmp_path, False, list(wrong.values())
    )
    for told, run in zip(wrong, runs, strict=True):
        kind, _, message = run["error"].partition(": ")
        assert kind in ("ValueError", "ModelError")
        assert told in message


def command(*argv: object, status: int = 0) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "imatrix", *(str(each) for each in argv)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


@needs_rpc
def test_the_commands(
    endpoints: list[str], model: Path, text: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    servers = ["--rpc", ",".join(endpoints)]
    common = ["-c", "64", "-t", "1", "--chunks", "2"]
    matrices = []
    collect = ["collect", "-m", model, "-f", text, "--mtp", *common]
    for n, placement in enumerate((["-ngl", "0"], [*servers, "-ts", "1,1", "-ncmoe", "2"])):
        out = tmp_path / f"{n}.gguf"
        # the engine has a process of its own: the servers are known there
        command(*collect, "-o", out, *placement)
        matrices.append(ImportanceMatrix.load(out))
    for name, entry in matrices[0].items():
        apart = np.abs(matrices[1][name].sums - entry.sums).max() / entry.sums.max()
        assert apart <= TOLERANCE, name
    if not any(device.gpu for device in imatrix.backends().devices):
        _, err = command(*collect, "-o", out, "-ts", "1,1", "-ncmoe", "2")
        assert "no GPU in this build or machine: -ts, -ncmoe are ignored" in err
    _, err = command(*collect, "-o", out, *servers, "-b", "auto", status=2)
    assert "serves one process at a time: give the number of tokens" in err
    _, err = command(*collect, "-o", out, *servers, "-sm", "tensor", status=2)
    assert "leaves out sums over the devices" in err

    listed, _ = command("evaluate", *servers, "--list-devices")
    for n, endpoint in enumerate(endpoints):
        assert re.search(rf"  RPC{n}: {endpoint}.*, buffer type RPC0\[{endpoint}\]\n", listed)

    # -sm tensor, which collect refuses, is accepted here: the perplexity is llama-perplexity's on
    # the same devices. That program prints four decimals.
    heads = []
    for placement in (["-ts", "1,1"], ["-sm", "tensor"]):
        out, _ = command("evaluate", model, "-f", text, "--json", *common, *servers, *placement)
        figures = json.loads(out)
        heads.append(figures["head"]["nll"]["value"])
        value = figures["trunk"]["perplexity"]["value"]
        tool = [engine_tool("llama-perplexity"), "-m", model, "-f", text, "-b", "64", "-fit", "off"]
        log = until_printed(
            "Final estimate",
            lambda tool=tool, placement=placement: run_tool(
                *tool, *common, *servers, *placement, "-ngl", "99"
            ),
        )
        found = re.search(r"Final estimate: PPL = ([\d.]+)", log)
        assert found is not None
        assert abs(value - float(found[1])) <= 1e-4 * float(found[1])
    # tensor mode needs flash attention, which adds in F16
    assert abs(heads[0] - heads[1]) <= 1e-4 * heads[0]


@needs_rpc
def test_why_tensor_mode_is_refused(
    endpoints: list[str], model: Path, text: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    """The engine's own collector goes wrong in this mode: if this test fails, NO_TENSOR_MODE may
    go."""
    found = []
    for mode in ("layer", "tensor"):
        tool = [
            engine_tool("llama-imatrix"), "-m", model, "-f", text, "-o", tmp_path / "out.gguf",
            "-c", "64", "-b", "64", "--chunks", "2", "-t", "1", "-ngl", "99", "-fit", "off",
            "--rpc", ",".join(endpoints), "-sm", mode,
        ]  # fmt: skip
        log = until_printed("Final estimate", lambda tool=tool: run_tool(*tool))
        figure = re.search(r"Final estimate: PPL = ([\d.]+)", log)
        assert figure is not None
        found.append(float(figure[1]))
    assert abs(found[1] - found[0]) > 0.01 * found[0]


# --- programs that are no ggml-rpc-server --------------------------------------------


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """host:port of a program that is no ggml-rpc-server: it says something and hangs up, or (None)
    says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        held = []

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                if answer is None:
                    held.append(client)
                else:
                    client.sendall(answer)
                    client.close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()
            for client in held:
                client.close()


@needs_rpc
def test_a_server_that_speaks_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    known = devices.rpc_servers()
    with (
        listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as endpoint,
        pytest.raises(OSError, match=rf"{endpoint} is no ggml-rpc-server that this engine can"),
    ):
        imatrix.add_rpc_server(endpoint)
    monkeypatch.setattr(devices, "_ANSWER", 2)
    with (
        listener(None) as endpoint,
        pytest.raises(OSError, match=r"takes connections, but does not answer within 2 s"),
    ):
        devices.name_rpc_server(endpoint)
    assert devices.rpc_servers() == known


@needs_rpc
def test_a_wrong_host_on_the_command_line(model: Path, text: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: nobody else gets it meanwhile
        endpoint = f"127.0.0.1:{closed.getsockname()[1]}"
        for argv in (
            ["collect", "-m", model, "-f", text, "-o", tmp_path / "no.gguf"],
            ["collect", "-m", model, "-f", text, "-o", tmp_path / "no.gguf", "--no-isolate"],
            ["evaluate", model, "-f", text],
        ):
            _, err = command(*argv, "--rpc", endpoint, status=1)
            assert f"no RPC server at {endpoint}: " in err
            assert f"ggml-rpc-server -H 127.0.0.1 -p {endpoint.rpartition(':')[2]}" in err
            _, err = command(*argv, "--rpc", "localhost", status=2)
            assert "'localhost' is not host:port" in err


@needs_rpc
def test_one_of_two_servers_cannot_be_used(
    endpoints: list[str], model: Path, text: Path, tmp_path: Path
) -> None:
    """It is named, nothing is written, and the other one can be used without it."""
    out = tmp_path / "out.gguf"
    collect = ["collect", "-m", model, "-f", text, "-o", out, "-c", 64, "-t", 1, "--chunks", 1]
    with socket.socket() as closed, listener(b"HTTP/1.1 400 Bad Request\r\n\r\n") as other:
        closed.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{closed.getsockname()[1]}"
        for bad, why in (
            (nobody, f"no RPC server at {nobody}: "),
            (other, f"{other} is no ggml-rpc-server that this engine can talk to: "),
        ):
            _, err = command(*collect, "--rpc", f"{endpoints[0]},{bad}", status=1)
            assert why in err
            assert endpoints[0] not in err
            assert not out.exists()
    command(*collect, "--rpc", endpoints[0])
    assert ImportanceMatrix.load(out).chunk_count == 1


@needs_rpc
def test_a_server_that_goes_away(
    model: Path, text: Path, engine_tool: EngineTool, tmp_path: Path
) -> None:
    """The engine ends its process; the other process says what is left."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tool = [engine_tool("ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
    out = tmp_path / "out.gguf"
    checkpoint = tmp_path / "out.gguf.checkpoint"
    server = subprocess.Popen(tool, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.05)
        run = subprocess.Popen(
            [
                sys.executable, "-m", "imatrix", "collect", "-m", model, "-f", text, "-o", out,
                "-c", "32", "-b", "32", "-t", "1", "-ofreq", "1", "--rpc", f"127.0.0.1:{port}",
            ],
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not checkpoint.exists() and run.poll() is None:
            time.sleep(0.01)
    finally:
        server.kill()
        server.wait()
    _, err = run.communicate(timeout=300)
    assert run.returncode == 1, err
    assert "the process that ran the engine is gone: " in err
    assert f"{checkpoint} holds " in err
    assert "run the same again to go on from it" in err
