"""A tokenizer of characters, for tests of texts that need no model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

BOS = 1


@dataclass
class Characters:
    """One token for each character, its code point; BOS in front if it is asked for."""

    add_bos: bool = False
    bos: int = BOS
    calls: list[tuple[str, bool, bool]] = field(default_factory=list)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> np.ndarray:
        self.calls.append((text, add_special, parse_special))
        front = [self.bos] if add_special and self.add_bos else []
        return np.array(front + [ord(c) for c in text], dtype=np.int32)
