"""Small whole models that the engine accepts: the mutations for the engine start from them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from helpers.forge import make_model
from helpers.forge_any import make_any

_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # llama_token_type (include/llama.h)
_WORDS = [
    "▁",
    "▁t",
    "▁the",
    "he",
    "in",
    "er",
    "an",
    "on",
    "a",
    "e",
    "o",
    "t",
    "s",
    "n",
    "i",
    "r",
    "h",
]


def _bytes_and_words(model: str, specials: list[str], extra: Mapping[str, Any]) -> dict[str, Any]:
    tokens = [*specials, *(f"<0x{b:02X}>" for b in range(256)), *_WORDS]
    kinds = [_CONTROL] * len(specials) + [_BYTE] * 256 + [_NORMAL] * len(_WORDS)
    kinds[0] = _UNKNOWN
    return {
        "tokenizer.ggml.model": model,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(i) for i in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        **extra,
    }


def _tokenizers() -> dict[str, dict[str, Any]]:
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
    words = [f"▁{w}" for w in ("the", "of", "a", "in", "it")]
    bert = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *words, *"▁.,!?"]
    return {
        "spm": _bytes_and_words("llama", ["<unk>", "<s>", "</s>"], {"tokenizer.ggml.add_bos_token": True}),
        "ugm": _bytes_and_words(
            "t5",
            ["<pad>", "</s>", "<unk>"],
            {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.unknown_token_id": 2},
        ),
        "plamo2": _bytes_and_words("plamo2", ["<unk>", "<s>", "</s>", "<pad>"], {}),
        "wpm": {
            "tokenizer.ggml.model": "bert",
            "tokenizer.ggml.tokens": bert,
            "tokenizer.ggml.token_type": [_CONTROL] * 5 + [_NORMAL] * (len(bert) - 5),
            "tokenizer.ggml.bos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 1,
            "tokenizer.ggml.seperator_token_id": 3,
            "tokenizer.ggml.mask_token_id": 4,
            "tokenizer.ggml.padding_token_id": 0,
        },
        "rwkv": {
            "tokenizer.ggml.model": "rwkv",
            "tokenizer.ggml.tokens": ["<s>", *(chr(b) if 32 < b < 127 and b != 92 else f"\\x{b:02x}" for b in range(256))],
            "tokenizer.ggml.token_type": [_CONTROL] + [_NORMAL] * 256,
        },
    }  # fmt: skip


_SMALL = {"n_embd": 64, "n_ff": 64, "n_head": 2, "n_head_kv": 1, "head_dim": 32, "n_rot": 32}
_EXPERTS = {"n_expert": 4, "n_expert_used": 2, "n_ff_exp": 32, "n_ff_shexp": 32}
_FORGED: dict[str, dict[str, Any]] = {
    "glm4moe": {"n_nextn": 1, **_SMALL, **_EXPERTS},
    "qwen35": {"n_nextn": 1, **_SMALL},
    "hy_v3": {"n_nextn": 2, **_SMALL, **_EXPERTS},
}
_NARROW = {
    "feed_forward_length": 64,
    "expert_feed_forward_length": 32,
    "expert_shared_feed_forward_length": 32,
}
_ANY = (
    "step35", "mimo2", "qwen35moe", "qwen3next", "bailingmoe3", "cohere2moe", "deepseek2",
    "deepseek4", "nemotron_h_moe", "gemma4",
)  # fmt: skip


def make_models(folder: Path) -> dict[str, Path]:
    """Write every seed model that does not exist yet; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {}

    def path(name: str) -> Path:
        out[name] = folder / f"{name}.gguf"
        return out[name]

    if not path("llama-gpt2").exists():
        make_model(out["llama-gpt2"], "llama", **_SMALL)
    for name, keys in _tokenizers().items():
        if not path(f"llama-{name}").exists():
            n_vocab = len(keys["tokenizer.ggml.tokens"])
            numbered = {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.eos_token_id": None}
            make_model(
                out[f"llama-{name}"], "llama", tokenizer=None, n_vocab=n_vocab,
                metadata={**numbered, **keys}, **_SMALL,
            )  # fmt: skip
    for arch, options in _FORGED.items():
        if not path(arch).exists():
            make_model(out[arch], arch, **options)  # type: ignore[arg-type]
    for arch in _ANY:
        if not path(arch).exists():
            make_any(out[arch], arch, n_nextn=2, n_embd=64, metadata=_NARROW)
    return out


if __name__ == "__main__":
    for name, path in make_models(Path(sys.argv[1])).items():
        print(name, path.stat().st_size)
