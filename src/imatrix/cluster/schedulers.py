"""TODO."""

from __future__ import annotations

import shlex
import shutil
import signal
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from imatrix.errors import ClusterError

CONNECT = "20s"


# Dask looks at itself a hundred times a second, in every process: 2 % of a core each here, which are
# the engine's on a machine of its own.
LOCAL = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
}


JOBS = {
    "slurm": "SLURMCluster",
    "pbs": "PBSCluster",
    "sge": "SGECluster",
    "lsf": "LSFCluster",
    "htcondor": "HTCondorCluster",
    "oar": "OARCluster",
    "moab": "MoabCluster",
}


@contextmanager
def started_scheduler(*but: type[BaseException]) -> Iterator[None]:
    """Where the scheduler is asked: that it does not answer is a ClusterError."""
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise scheduler_gone(error) from error


def scheduler_gone(error: BaseException) -> ClusterError:
    return ClusterError(f"the cluster's scheduler went away: {error}. {AND_NOW}")


AND_NOW = (
    "What was collected before is safe: in Collector.matrix, and in the checkpoint if there is "
    "one, from which the same run goes on."
)


def import_distributed() -> Any:
    try:
        import distributed
    except ImportError as error:
        raise ImportError(
            "a run on a cluster needs Dask: pip install 'imatrix[dask]'", name="distributed"
        ) from error
    return distributed


def config(values: Mapping[str, object]) -> AbstractContextManager[Any]:
    """Dask's configuration with these, for what is made meanwhile."""
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


def job_cluster(kind: str) -> Any:
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

    queue = getattr(dask_jobqueue, JOBS[kind])
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
