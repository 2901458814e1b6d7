"""Connects to Dask: a scheduler that is there, processes of this machine, or jobs of a queue."""

from __future__ import annotations

import shlex
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from imatrix.engine.cores import physical_cores
from imatrix.errors import ClusterError

__all__ = ["AND_NOW", "asking_scheduler", "connect", "import_distributed", "scheduler_gone"]

AND_NOW = (
    "What was collected before is safe: in Collector.matrix, and in the checkpoint if there is "
    "one, from which the same run goes on."
)

_CONNECT = "20s"  # how long a scheduler may take to answer

# Dask looks at itself a hundred times a second, in every process: 2 % of a core each here, which are
# the engine's on a machine of its own.
_LOCAL = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
}

# kinds of jobs, and the classes of dask_jobqueue that start them
_JOBS = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "htcondor": "HTCondorCluster",
    "oar": "OARCluster",
    "moab": "MoabCluster",
}


@contextmanager
def asking_scheduler(*but: type[BaseException]) -> Iterator[None]:
    """Turns an OSError of the scheduler, which does not answer, into a ClusterError; all but these
    exceptions."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise scheduler_gone(error) from error


def scheduler_gone(error: BaseException) -> ClusterError:
    """The error if this was raised because the scheduler does not answer any more."""
    return ClusterError(f"the cluster's scheduler went away: {error}. {AND_NOW}")


def import_distributed() -> Any:
    """The module distributed.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            "a run on a cluster needs Dask: pip install 'imatrix[dask]'", name="distributed"
        ) from error
    return distributed


def _configured(values: Mapping[str, object]) -> AbstractContextManager[Any]:
    """Dask's configuration with these values, for what is made within the context."""
    import dask

    found: AbstractContextManager[Any] = dask.config.set(values)
    return found


@contextmanager
def _keeping_signals() -> Iterator[None]:
    """Leaves the process its signal handlers. dask_jobqueue takes SIGINT for itself when it is
    imported (runner.py), so that Ctrl-C would end a run as sys.exit() does; outside the main thread
    it could not be imported at all."""
    setter = signal.signal
    signal.signal = lambda number, _: signal.getsignal(number)  # type: ignore[assignment]
    try:
        yield
    finally:
        signal.signal = setter


def _job_cluster(kind: str) -> Any:
    try:
        with _keeping_signals():
            import dask_jobqueue
    except ImportError as error:
        raise ImportError(
            f"{kind}:N needs dask-jobqueue: pip install 'imatrix[jobqueue]'", name="dask_jobqueue"
        ) from error
    import dask

    def configured(name: str) -> Any:
        return dask.config.get(f"jobqueue.{kind}.{name}", None)

    queue = getattr(dask_jobqueue, _JOBS[kind])
    submit = shlex.split(queue.job_cls.submit_command)[0]
    if shutil.which(submit) is None:  # or the run would wait for workers, and wait
        raise ClusterError(
            f"{kind}:N submits jobs with {submit}, which is not on this machine: run this where "
            "jobs are submitted"
        )
    return queue(
        # One worker a job, with one block at a time: a job's cores are for the engine, which has
        # threads of its own. The last --nthreads counts.
        processes=configured("processes") or 1,
        worker_extra_args=[*(configured("worker-extra-args") or ()), "--nthreads", "1"],
    )


def connect(where: Any, opened: ExitStack) -> tuple[Any, int | None]:
    """Connect to a cluster, or start one.

    Args:
        where: as Cluster has it.
        opened: takes what is to be closed with the Cluster.

    Returns:
        The distributed.Client, and the threads for each worker's engine if they share this machine.

    Raises:
        ValueError, ImportError, ClusterError: as Cluster does.
    """
    if not isinstance(where, str):
        distributed = import_distributed()
        if not isinstance(where, distributed.Client):
            raise ValueError(
                "expected a scheduler's address, local:N, slurm:N or a distributed.Client, got "
                f"{where!r}"
            )
        return where, None
    if where.startswith("tls://"):
        security = import_distributed().Security()
        if security.get_connection_args("client").get("ssl_context") is None:
            raise ValueError(
                f"{where} needs certificates, and Dask's configuration names none: set "
                "distributed.comm.tls.ca-file, .client.cert and .client.key, in a file or as "
                "DASK_DISTRIBUTED__COMM__TLS__CA_FILE and so on"
            )
    if "://" in where:
        return _client_of(import_distributed(), where, where, opened), None
    kind, _, number = where.partition(":")
    if kind not in ("local", *_JOBS) or not number.isdigit() or int(number) < 1:
        raise ValueError(
            f"expected a scheduler's address as tcp://host:8786, local:N, or one of "
            f"{', '.join(f'{name}:N' for name in _JOBS)}, got {where!r}"
        )
    distributed = import_distributed()
    threads = None
    if kind == "local":
        n = int(number)
        threads = max(1, physical_cores() // n)
        with _configured(_LOCAL):
            cluster = distributed.LocalCluster(
                n_workers=n,
                threads_per_worker=1,
                processes=True,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                # the model is in the engine's process, which Dask does not see
                memory_limit=0,
                preload="imatrix.cluster.preload",
            )
    else:
        cluster = _job_cluster(kind)
        cluster.scale(jobs=int(number))
    opened.enter_context(cluster)
    return _client_of(distributed, cluster, where, opened), threads


def _client_of(distributed: Any, cluster: Any, where: str, opened: ExitStack) -> Any:
    try:
        client = distributed.Client(cluster, timeout=_CONNECT, set_as_default=False)
    except OSError as error:
        raise ClusterError(
            f"no Dask scheduler answers at {where}: {error}. Start one with `dask scheduler`, "
            "and workers with `dask worker ADDRESS --nthreads 1`"
        ) from error
    return opened.enter_context(client)
