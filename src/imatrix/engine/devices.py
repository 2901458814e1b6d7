"""What this build has and which devices it sees."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import dataclass

from imatrix.engine.children import last_words, run_child
from imatrix.native import engine as native

__all__ = ["engine_name"]


def engine_name() -> str:
    """The engine as it is named in files: "llama.cpp 0.6.0 (build 11549)"."""
    version, build = native.engine()
    return f"llama.cpp {version} ({build})"


@dataclass(frozen=True)
class Device:
    """A device that the engine can compute on.

    Attributes:
        backend: the ggml backend it belongs to ("CPU", "CUDA", "Metal", "Vulkan", "RPC", ...).
        name: the engine's name for it ("CUDA0").
        description: its own name.
        buffer_type: what override_tensor calls its memory ("CPU", "CUDA0").
        gpu: whether layers can be offloaded to it.
        memory_free, memory_total: bytes; 0 if the backend does not say.
    """

    backend: str
    name: str
    description: str
    buffer_type: str
    gpu: bool
    memory_free: int
    memory_total: int


@dataclass(frozen=True)
class UnusableBackend:
    """A backend that is there as a module, and cannot be used.

    Attributes:
        file: its name, in imatrix/lib or in the folder of a distribution such as imatrix-cuda.
        reason: why, mostly in the words of the system's loader: a library that is missing.
    """

    file: str
    reason: str


@dataclass(frozen=True)
class Backends:
    """What the build has.

    Attributes:
        engine: name, version and build of the engine.
        built: backends in this build, with or without a device here.
        unusable: backends in this build that cannot be loaded here, and why.
        devices: devices found now.
        cpu_variant: which variant of the CPU's backend was chosen for this processor, such as
            "haswell"; None if the build has one only, as from source it has.
        row_kernel: the kernel for adding squares that is used: the best, or the one that the
            environment variable IMATRIX_KERNEL names.
        row_kernels: those that this processor can run, best first.
        features: instruction sets and build options, in the engine's words.
    """

    engine: str
    built: tuple[str, ...]
    unusable: tuple[UnusableBackend, ...]
    devices: tuple[Device, ...]
    cpu_variant: str | None
    row_kernel: str
    row_kernels: tuple[str, ...]
    features: str


def backends() -> Backends:
    """Ask the engine for its backends and devices.

    Raises:
        ValueError: IMATRIX_KERNEL names a row kernel that this processor does not have.
        EngineError: no backend for the CPU can be loaded, or another copy of ggml is in its way;
            the message says what to do.
    """
    native.load_backends()
    version, build = native.engine()
    built, devices = native.backends()
    return Backends(
        engine=f"llama.cpp {version} ({build})",
        built=tuple(built),
        unusable=tuple(
            UnusableBackend(file, reason) for file, reason in native.backend_modules() if reason
        ),
        devices=tuple(Device(**device) for device in devices),
        cpu_variant=native.cpu_variant() or None,
        row_kernel=native.chosen_row_kernel(),
        row_kernels=tuple(native.row_kernel_names()),
        features=native.system_info().strip(),
    )


def add_rpc_server(endpoint: str) -> None:
    """Make the devices of a ggml-rpc-server known, as llama.cpp's --rpc does.

    Models loaded from now on may use them, as GPUs; there is no way to take them back. Needs a
    build with GGML_RPC=ON. The engine ends the process if such a server goes away.

    Args:
        endpoint: "host:port"; several with commas between them.

    Raises:
        ValueError: not host:port.
        OSError: nobody listens there.
        EngineError: this build has no RPC backend, or the server has no device.
    """
    for each in _checked(endpoint):
        native.add_rpc_server(each)
        _remember(each)


def name_rpc_server(endpoint: str) -> None:
    """As add_rpc_server(), for the engines of Collectors with isolate=True only: this process's
    own engine does not talk to it.

    Raises:
        ValueError, OSError: as add_rpc_server() does.
    """
    for each in _checked(endpoint):
        _remember(each)


def rpc_servers() -> list[str]:
    """The servers that were made known, "host:port" each, for a child process to add too."""
    return list(_rpc_servers)


_rpc_servers: list[str] = []


def _remember(endpoint: str) -> None:
    if endpoint not in _rpc_servers:
        _rpc_servers.append(endpoint)


def _checked(endpoint: str) -> list[str]:
    found = endpoint.split(",")
    for each in found:
        host, colon, port = each.partition(":")
        if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"{each!r} is not host:port, in {endpoint!r}")
    if "RPC" in native.backends()[0]:
        for each in found:
            if each not in _rpc_servers:
                _check_answers(each)
    return found


def _check_answers(endpoint: str) -> None:
    """Whether an RPC server of this engine's version is there. The engine would end the process
    if not (ggml-rpc.cpp, rpc_dispatcher::start), so a child asks."""
    host, _, port = endpoint.partition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise OSError(
            f"no RPC server at {endpoint}: {error}. Start one there: ggml-rpc-server -H {host} -p "
            f"{port}"
        ) from error
    if not sys.executable:
        return  # the engine will tell, in its way
    try:
        status, _, stderr = run_child({"do": "ask a server", "endpoint": endpoint}, timeout=_ANSWER)
    except subprocess.TimeoutExpired:
        raise OSError(
            f"{endpoint} takes connections, but does not answer within {_ANSWER} s as a "
            "ggml-rpc-server: it is another program, or serves another client, one at a time"
        ) from None
    if status != 0:
        raise OSError(
            f"{endpoint} is no ggml-rpc-server that this engine can talk to: "
            f"{last_words(stderr, status)}. It has to be of the same version of llama.cpp"
        )


_ANSWER = 30  # seconds
