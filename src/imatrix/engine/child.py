"""TODO."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from typing import Any

from imatrix.errors import EngineError, ModelError

# Every kind of character that a tokenizer treats on its own, and every byte of UTF-8.
_SAMPLE = (
    "".join(map(chr, range(1, 128)))
    + "  The the\n\n\t it's 1234567 <s></s> [CLS] <|im_start|> <unk> <0x0A> \u2581\u2581a\r\n"
    + "\u00e9\u00df\u0301 \u0416\u05d0\u0627\u0939\u0e01\u4e2d\u6587\uac00\u3042\ufffd\U0001f600"
    + "\U000e0001\U0010ffff\u200b\u2028 \u00a0\ud7ff"
)


LOADED, BUILT, DECODED, _TOKENIZED = "loaded", "built", "decoded", "tokenized"


CAUSAL, NOT_CAUSAL = "causal", "not causal"


def _work(work: dict[str, Any]) -> None:
    """What the child does."""
    try:
        if "quantize" in work:
            _quantize(work["quantize"])
        elif "load" in work:
            _load(work["load"], work["mtp"])
        else:
            _build(work)
    except Exception:
        # not what is looked for here: the run itself will meet it, and raise it
        return


def _report_stage(stage: str) -> None:
    print(stage, flush=True)


def _build(work: dict[str, Any]) -> None:
    from imatrix.engine.settings import whole
    from imatrix.native import engine

    settings = work["settings"]
    separate = work["mtp_model"]

    def load(path: str, mtp: bool) -> engine.Model:
        return engine.Model(
            path, mtp=mtp, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
        )

    with_head = settings["mtp"]
    model = load(work["model"], with_head and separate is None)
    head = None
    if with_head:
        head = model if separate is None else load(separate, True)
    _report_stage(LOADED)
    if len(settings) > 1 and model.has_decoder and not model.has_encoder:
        causal = model.causal()
        _report_stage(CAUSAL if causal else NOT_CAUSAL)
        settings = settings if causal else whole(settings)
        session = engine.Session(model, head)
        try:
            session.open(**settings)
        except ModelError as error:
            _report_stage("refused " + f"{separate or work['model']}: {error}".replace("\n", " "))
            return
        _report_stage(BUILT)
        with contextlib.suppress(EngineError, MemoryError):  # the run will say why
            session.open(**settings, computes=False)
            session.try_decode()
    _report_stage(DECODED)
    if model.has_tokenizer:
        for parse_special in (False, True):
            model.tokenize(_SAMPLE, add_special=True, parse_special=parse_special)
    _report_stage(_TOKENIZED)


def _load(path: str, mtp: bool) -> None:
    from imatrix.native import engine

    try:
        engine.Model(
            path, mtp=mtp, n_gpu_layers=0, use_mmap=False, check_tensors=False, no_alloc=True
        )
    except ModelError as error:
        _report_stage("refused " + str(error).replace("\n", " "))


def _quantize(path: str) -> None:
    from imatrix.native import quantizer
    from imatrix.quantization.types import FTYPES

    quantizer.dry_run(
        os.fsencode(path),
        ftype=FTYPES["Q4_K_M"],
        pure=False,
        quantize_output=True,
        has_matrix=True,
        tensor_types=[],
    )


if __name__ == "__main__":
    _work(json.loads(sys.argv[1]))
