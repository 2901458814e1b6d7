"""What was collected, how, and from what text: the figures at the top, facts and sources."""

from __future__ import annotations

from imatrix.matrix.summary import describe_unused
from imatrix.report.parts import Fact, Source
from imatrix.report.subject import Subject
from imatrix.report.thin import Thin
from imatrix.report.words import count
from imatrix.words import few

__all__ = ["made_facts", "text_sources", "tiles"]


def tiles(subject: Subject, thin: Thin) -> list[Fact]:
    """The figures at the top."""
    matrix = subject.matrix
    blocks = sorted(matrix.head_blocks)
    head = f"{len(matrix.head)} head"
    if blocks:
        head += f" (block {few(blocks, 4)})"
    found = [
        Fact("weights", f"{len(matrix):,}", f"{len(matrix.trunk):,} trunk, {head}"),
        Fact(
            "chunks", f"{matrix.chunk_count:,}" if matrix.chunk_count else "", _chunk_note(subject)
        ),
        Fact("tokens", f"{subject.tokens:,}" if subject.tokens else "", _tokens_note(subject)),
    ]
    if coverage := thin.experts:
        found.append(
            Fact(
                "experts",
                f"{coverage.n_experts:,}",
                f"the thinnest saw {count(coverage.thinnest[2], 'row')}",
            )
        )
    return found


def _chunk_note(subject: Subject) -> str:
    if not subject.matrix.chunk_size or subject.form == "dat":
        return "of unknown size"
    most = "up to " if subject.made.packing == "document" else ""
    return f"of {most}{subject.matrix.chunk_size:,} tokens"


def _tokens_note(subject: Subject) -> str:
    if subject.made.tokens is not None:
        return "that count"
    if not subject.tokens:
        return ""
    if subject.form == "dat":
        return f"if a chunk has {subject.matrix.chunk_size:,}: .dat files do not tell"
    return "chunks times their size"


def made_facts(subject: Subject) -> list[Fact]:
    """How it was made."""
    made, matrix = subject.made, subject.matrix
    packing = {
        "stream": "all texts one stream, cut at every chunk's end",
        "document": "no chunk has tokens of two documents",
    }
    if made.seed is not None:
        order = Fact("Order of the text", "shuffled", f"with seed {made.seed}")
    elif made.packing:
        order = Fact("Order of the text", "as it was given")
    else:
        order = Fact("Order of the text", "")
    if made.mtp is None:
        head = Fact("MTP head", "in the file" if matrix.head else "not in the file")
    else:
        head = Fact("MTP head", "collected" if made.mtp else "not collected")
    # a .dat file does not tell it: the chunk size is what the reader was told
    n_ctx = made.n_ctx or (0 if subject.form == "dat" else matrix.chunk_size)
    return [
        *([Fact("File", f"{subject.format} importance matrix")] if subject.format else []),
        Fact("Collected by", made.collector or ""),
        Fact("Engine", made.engine or ""),
        head,
        Fact("Context", f"{n_ctx:,} tokens" if n_ctx else "", "what a token can look back on"),
        Fact("Packing", made.packing or "", packing.get(made.packing or "", "")),
        order,
        _left_out(subject),
        *([Fact("Not used", unused)] if (unused := describe_unused(made.sources)) else []),
        _digest(subject),
    ]


def _left_out(subject: Subject) -> Fact:
    label = "Chunks left out"
    if subject.matrix.provenance is None:
        return Fact(label, "")
    left_out = subject.made.left_out
    if not left_out:
        return Fact(label, "none", "no NaN or infinite activation came up")
    places = few([f"{one.chunk} at token {one.token:,} ({one.weight})" for one in left_out], 4)
    return Fact(label, f"{len(left_out):,}", f"a NaN or infinite activation came up: {places}")


def _digest(subject: Subject) -> Fact:
    label = "Digest of the tokens"
    if subject.made.dataset_digest:
        return Fact(label, subject.made.dataset_digest, "SHA-256: the same text, the same digest")
    if subject.matrix.provenance is None:
        return Fact(label, "")
    return Fact(label, "", "a matrix that was merged from several has none")


def text_sources(subject: Subject) -> list[Source]:
    """Where the text came from, the largest first if the tokens are known."""
    if not subject.made.sources:
        return [Source(name) for name in subject.matrix.datasets]
    total = sum(each.tokens for each in subject.made.sources)
    return [
        Source(
            each.name,
            each.documents,
            each.tokens,
            each.tokens / total if total else 0.0,
            each.dropped,
            each.weight,
        )
        for each in sorted(subject.made.sources, key=lambda each: -each.tokens)
    ]
