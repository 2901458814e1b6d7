"""Whole runs from Python with a binding that was built with sanitizers: see sanitize.sh.

LD_PRELOAD=libasan.so python tests/native/end_to_end.py FOLDER_OF_THE_BINDING MODEL...
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import itertools
import sys
import tempfile
import threading
import warnings
from pathlib import Path


def load(folder: Path) -> None:
    """Load the binding from that folder before anything imports the other one."""
    [path] = folder.glob("engine*.so")
    spec = importlib.util.spec_from_file_location("imatrix.native.engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["imatrix.native.engine"] = module
    spec.loader.exec_module(module)


class Enough(Exception):
    pass


def run(path: str, folder: Path) -> None:
    """Runs trunk and head with several threads: interrupted, resumed, cancelled, looked at,
    evaluated."""
    from imatrix import Collector, evaluate

    chunks = [[(7 * i + j) % 250 for j in range(64)] for i in range(6)]
    checkpoint = folder / "checkpoint"
    options = {"n_ctx": 64, "n_threads": 2, "rehearse": False}

    def enough(at):
        if at.chunks == 3:
            raise Enough

    with Collector(path, **options) as made, Collector(path, **options) as other:
        mtp = made.n_nextn > 0
        run = {"mtp": mtp, "perplexity": True}
        whole = made.run(chunks, process_output=True, **run)
        assert whole.chunk_count == 6
        whole = made.run(chunks, **run)
        with contextlib.suppress(Enough):
            made.run(chunks, checkpoint=checkpoint, progress=enough, **run)
        assert made.run(chunks, checkpoint=checkpoint, **run) == whole
        checkpoint.unlink()
        made.plan(mtp=mtp)

        # two runs at once, and a third thread that looks at them
        found = []
        threads = [
            threading.Thread(target=lambda each=each: found.append(each.run(chunks, **run)))
            for each in (made, other)
        ]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            assert made.matrix.chunk_count <= 6
        for thread in threads:
            thread.join()
        assert found == [whole, whole]

        # another thread ends it in the middle of a step
        started = threading.Event()
        raised = []

        def endless():
            try:
                other.run(itertools.cycle(chunks), mtp=mtp, progress=lambda _: started.set())
            except RuntimeError as error:
                raised.append(error)

        thread = threading.Thread(target=endless)
        thread.start()
        started.wait()
        other.close()
        thread.join()
        assert len(raised) == 1
    with Collector(path, **(options | {"n_seq": 3})) as made:
        made.run(chunks)
    evaluate(path, chunks, n_ctx=64, n_threads=2, rehearse=False)


def main() -> None:
    load(Path(sys.argv[1]))
    from imatrix.native import engine

    assert str(Path(sys.argv[1]).resolve()) in str(Path(engine.__file__).resolve())
    warnings.simplefilter("error")
    for model in sys.argv[2:]:
        with tempfile.TemporaryDirectory() as folder:
            run(model, Path(folder))
    gc.collect()
    live = engine.live_objects()
    assert not any(live.values()), live
    print("end to end: ok")


if __name__ == "__main__":
    main()
