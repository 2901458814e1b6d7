"""Where calibration text comes from: files of several formats, folders, datasets, and mixtures.

A source gives documents: texts, or chats that the model's template has yet to render. This module
reads and orders them; imatrix.text.chunks makes token chunks of them.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from imatrix.files.outputs import Input
from imatrix.text.plain import BOM, decoded, parsed_json
from imatrix.text.readers import (
    KINDS,
    PACKED,
    STDIN,
    Kind,
    dataset_of,
    describe_path,
    files_in,
    import_datasets,
    import_parquet,
    import_zstandard,
    kind_of,
    opened,
    unpacked_name,
)
from imatrix.text.records import CHAT_FIELDS, messages_of, unpadded, unpadding

__all__ = ["Chat", "Found", "Item", "Mixture", "OnBadRecord", "Source", "document", "text_inputs"]


def text_inputs(texts: object) -> Iterator[Input]:
    """The files of what Collector.run takes for its texts; none of a text that is no file."""
    sources: Sequence[object] = texts.sources if isinstance(texts, Mixture) else [texts]
    for each in sources:
        if isinstance(each, Source):
            # what cannot be listed cannot be read, which whoever reads it will tell
            with contextlib.suppress(OSError, ValueError):
                for path in each.files():
                    if path is None:
                        yield Input("-")
                    else:
                        own = os.fspath(path) == each.at
                        yield Input(os.fspath(path), "" if own else f"a text of {each.at}")
        elif isinstance(each, os.PathLike):
            yield Input(os.fspath(each))
        elif isinstance(name := getattr(each, "name", None), str) and hasattr(each, "read"):
            yield Input(name)


OnBadRecord = Literal["stop", "skip"]
"""What a record does that cannot be used: end the run, or count as skipped."""

FIELDS = (*CHAT_FIELDS, "text")
"""Fields of a record that are looked for, the first that it has."""


# What a shuffle holds at most: whichever is reached first, and one document in any case.
_HELD_DOCUMENTS = 10_000
_HELD_CHARACTERS = 64 * 2**20

_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_PREFIX = re.compile(r"(text|jsonl|parquet|hf):(.+)", re.DOTALL)


# Fields of a record that go with its messages.
_TOOLS, _DOCUMENTS, _SYSTEM, _VARIABLES = "tools", "documents", "system", "chat_template_kwargs"


@dataclass(frozen=True)
class Chat:
    """A conversation, to be rendered with the model's chat template.

    Attributes:
        messages: mappings with a `role` and what else the template reads, such as `content` and
            `tool_calls`.
        tools: JSON schemas of tools, as the template's `tools`; None for none.
        variables: further names for the template, over those of the run, such as
            `enable_thinking` or `documents`.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


Item: TypeAlias = "str | Chat | Sequence[int]"
"""A document: a text, a chat, or token ids."""


@dataclass(frozen=True)
class Found:
    """What a source has at one place.

    Attributes:
        where: file and line, row or number, as errors name it; "" for a text without a name.
        item: the document; None if its text is null, or if there is an error.
        error: why the record cannot be used; None if it can.
    """

    where: str
    item: Item | None = None
    error: Exception | None = None


class Source:
    """One place that documents come from.

    Args:
        at: one of

            - a path: a file, or a folder, whose files are read in the order of their names, those
              in its folders too (.txt .text .md .jsonl .ndjson .parquet, and .gz or .zst of all
              but the last; hidden ones are passed over);
            - "-": standard input;
            - "hf:NAME[:CONFIG][/SPLIT]": a Hugging Face dataset, streamed by the datasets library;
              SPLIT is train where it is not given. NAME is USER/DATASET, a DATASET without a user
              ("hf:wikitext:/test" for its split), or a folder that starts with / or .;
            - "text:…", "jsonl:…", "parquet:…": a path or "-", read as that whatever its name;
            - an iterable of documents: texts, Chats, records (mappings), or lists of token ids.

            The name of a file tells how to read it: JSON lines, Parquet, and everything else as
            one document of plain UTF-8 text, one newline at its end left out as llama-imatrix -f
            does; .gz and .zst are unpacked.
        weight: share of the tokens in a Mixture, against the other sources' weights.
        fields: fields of a record that may hold its text or its messages; the first that it has
            counts. A field that is a list of messages makes a Chat, with the record's `tools`,
            `documents`, `system` (put in front as a system message, unless there is one) and
            `chat_template_kwargs`. Messages have `role` and `content`, or ShareGPT's `from` and
            `value`. A record with nothing but null in its field is an empty document.
        name: what to call it in reports and files; None for what `at` says.

    Raises:
        ValueError: the weight is not a positive number, there are no fields, or `at` names no
            dataset.
        TypeError: `at` is none of the above.
    """

    def __init__(
        self,
        at: str | os.PathLike[str] | Iterable[Any],
        *,
        weight: float | None = None,
        fields: Sequence[str] = FIELDS,
        name: str | None = None,
    ) -> None:
        if weight is not None and not (weight > 0 and math.isfinite(weight)):
            raise ValueError(f"a weight must be a positive number, got {weight!r}")
        if isinstance(fields, str) or not fields:
            raise ValueError(f"fields must be one name or more in a sequence, got {fields!r}")
        self.weight = weight
        self.fields = tuple(fields)
        self._items: Iterable[Any] | None = None
        self._at = ""
        self._kind: Kind | None = None
        if isinstance(at, (str, os.PathLike)):
            self._at = os.fspath(at)
            found = _PREFIX.fullmatch(self._at) if isinstance(at, str) else None
            if found is not None and not Path(self._at).exists():
                self._kind, self._at = found[1], found[2]  # type: ignore[assignment]
                if self._kind == "hf":
                    dataset_of(self._at)
            self.name = name or os.fspath(at)
        elif hasattr(at, "read"):
            raise TypeError("an open file has no documents to tell apart; give its path")
        elif isinstance(at, Iterable) and not isinstance(at, (bytes, bytearray, Mapping)):
            self._items = at
            self.name = name or ""
        else:
            raise TypeError(
                f"a source is a path, a name, or an iterable of documents, not {type(at).__name__}"
            )

    @classmethod
    def parse(cls, text: str, *, fields: Sequence[str] = FIELDS) -> Source:
        """A source as the command line spells it: `AT` or `AT:WEIGHT`.

        A text that names an existing file is that file, colons and all.

        Raises:
            ValueError: as Source does.
        """
        found = _WEIGHT.fullmatch(text)
        if found is None or Path(text).exists():
            return cls(text, fields=fields)
        try:
            return cls(found[1], weight=float(found[2]), fields=fields)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None

    @property
    def plain(self) -> Path | None:
        """The file, where this is one file of plain text; None for all else."""
        if self._items is not None or self._at == STDIN or Path(self._at).is_dir():
            return None
        path = Path(self._at)
        kind = self._kind or kind_of(path)
        return path if kind == "text" and path.suffix not in PACKED else None

    @property
    def at(self) -> str:
        """The path, "-", or name of the data set; "" for an iterable."""
        return self._at

    def check(self) -> None:
        """Find out now whether there is something to read.

        Raises:
            OSError: no such file, or it cannot be read.
            ValueError: a folder without a file to read, or Parquet on standard input.
            ImportError: the library that reads it is not installed.
        """
        if self._items is not None:
            return
        if self._kind == "hf":
            import_datasets()
            return
        for path, kind in self._files(None):
            if path is None:
                if kind == "parquet":
                    raise ValueError("Parquet cannot be read from standard input; give a file")
                continue
            with path.open("rb"):
                pass
            if kind == "parquet":
                import_parquet(path)
            elif path.suffix == ".zst":
                import_zstandard(path)

    def files(self) -> list[Path | None]:
        """The files that are read, None for standard input; none of an iterable, and none of a
        data set that is not a folder here.

        Raises:
            OSError: a folder cannot be listed.
            ValueError: it has no file to read.
        """
        if self._items is not None:
            return []
        if self._kind == "hf":
            folder = Path(dataset_of(self._at)[0])
            # which of them the library takes is its own affair
            return [Path(at, name) for at, _, names in os.walk(folder) for name in names]
        return [path for path, _ in self._files(None)]

    def would_read(self, path: Path) -> bool:
        """Whether a file would be read once it is there: one in the folder that this is."""
        if self._items is not None or self._kind == "hf" or not Path(self._at).is_dir():
            return False
        folder = Path(os.path.realpath(self._at))
        real = Path(os.path.realpath(path.parent), path.name)
        if not real.is_relative_to(folder):
            return False
        if any(part.startswith(".") for part in real.relative_to(folder).parts):
            return False
        return self._kind is not None or unpacked_name(real).suffix.lower() in KINDS

    def documents(self, shuffled_by: random.Random | None = None) -> Iterator[Item]:
        """The documents, lazily and in order, without those whose text is null; a folder's files
        in an order drawn from `shuffled_by`, if that is given.

        Raises:
            ValueError: a record that cannot be understood, a text that is not UTF-8, or damaged
                data; the message has file and line.
            OSError: a file cannot be read.
            ImportError: the library that reads it is not installed.
        """
        for found in self.found(shuffled_by):
            if found.error is not None:
                raise found.error
            if found.item is not None:
                yield found.item

    def found(self, shuffled_by: random.Random | None = None) -> Iterator[Found]:
        """documents(), with those whose text is null, and with the records that cannot be used in
        place of the ValueError or TypeError that they are there. What ends a whole file is raised.
        """
        if self._items is not None:
            yield from self._given(self._items)
        elif self._kind == "hf":
            yield from self._dataset()
        else:
            for path, kind in self._files(shuffled_by):
                if kind == "parquet":
                    yield from self._rows(path)
                elif kind == "jsonl":
                    yield from self._lines(path)
                else:
                    yield self._text(path)

    def _given(self, items: Iterable[Any]) -> Iterator[Found]:
        # a data set of the library's, which pads its records as Parquet does
        padded = type(items).__module__.partition(".")[0] == "datasets"
        for number, item in enumerate(items):
            where = f"{self.name or 'documents'}[{number}]"
            if isinstance(item, Mapping):
                yield self._record(item, where, padded=padded)
            elif isinstance(item, list) and item and isinstance(item[0], Mapping):
                # a column of chats
                messages = unpadded(item) if padded else item
                yield self._record({self.fields[0]: messages}, where)
            else:
                yield Found(where, item)

    def _record(self, record: object, where: str, *, padded: bool = False) -> Found:
        try:
            if padded and isinstance(record, Mapping):
                record = {name: unpadded(value) for name, value in record.items()}
            return Found(where, document(record, self.fields, where))
        except ValueError as error:
            return Found(where, error=error)
        except RecursionError:
            return Found(where, error=ValueError(f"{where}: nested too deeply"))

    def _files(self, shuffled_by: random.Random | None) -> list[tuple[Path | None, Kind]]:
        """The files and how to read them; None for standard input."""
        if self._at == STDIN:
            return [(None, self._kind or "text")]
        path = Path(self._at)
        if not path.is_dir():
            return [(path, self._kind or kind_of(path))]
        found = sorted(files_in(path), key=lambda each: each.relative_to(path).parts)
        if self._kind is None:
            found = [each for each in found if unpacked_name(each).suffix.lower() in KINDS]
        if not found:
            raise ValueError(
                f"{path}: no file to read in this folder; looked for {', '.join(KINDS)} (and .gz, "
                ".zst)"
            )
        if shuffled_by is not None:
            _permute(found, shuffled_by)
        return [(each, self._kind or kind_of(each)) for each in found]

    def _text(self, path: Path | None) -> Found:
        where = describe_path(path)
        with opened(path) as file:
            content = file.read()
        try:
            return Found(where, decoded(content, where).removesuffix("\n"))
        except ValueError as error:
            return Found(where, error=error)

    def _lines(self, path: Path | None) -> Iterator[Found]:
        with opened(path) as file:
            for number, line in enumerate(file, 1):
                # a BOM stands at the head of each file that was put into this one
                if not line.removeprefix(BOM.encode()).strip():
                    continue
                where = f"{describe_path(path)}, line {number}"
                try:
                    hint = "; a .jsonl file has one JSON record a line"
                    record = parsed_json(decoded(line, where).strip(" \t\r\n"), where, hint)
                except ValueError as error:
                    yield Found(where, error=error)
                else:
                    yield self._record(record, where)

    def _rows(self, path: Path | None) -> Iterator[Found]:
        if path is None:
            raise ValueError("Parquet cannot be read from standard input; give a file")
        file = import_parquet(path)
        names = file.schema_arrow.names
        wanted = [*self.fields, _TOOLS, _DOCUMENTS, _SYSTEM, _VARIABLES]
        if not any(name in names for name in self.fields):
            raise _no_field(path, names, self.fields)
        columns = [name for name in names if name in wanted]
        convert = {name: unpadding(file.schema_arrow.field(name).type) for name in columns}
        number = 0
        with file:
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in _values(batch):
                    where = f"{path}, row {number}"
                    number += 1
                    if isinstance(row, ValueError):
                        yield Found(where, error=ValueError(f"{where}: {row}"))
                    else:
                        yield self._record(
                            {name: convert[name](value) for name, value in row.items()}, where
                        )

    def _dataset(self) -> Iterator[Found]:
        name, config, split = dataset_of(self._at)
        library = import_datasets()
        try:
            found = library.load_dataset(name, config, split=split, streaming=True)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(f"{self.name}: {error}") from error
        records = iter(found)
        for number in itertools.count():
            try:
                record = next(records, None)
            except (OSError, ImportError, MemoryError):
                raise
            except Exception as error:  # what its builders raise has no common type
                raise ValueError(
                    f"{self.name}: cannot be read from record {number} on: {error}"
                ) from error
            if record is None:
                return
            yield self._record(record, f"{self.name}, record {number}", padded=True)

    def __repr__(self) -> str:
        weight = "" if self.weight is None else f", weight={self.weight}"
        return f"Source({self.name!r}{weight})"


class Mixture:
    """Several sources as one text.

    Without weights the sources follow one another. With weights they are interleaved chunk by
    chunk: the next chunk comes from the source that is furthest behind its share of the tokens,
    so that every beginning of the text has the shares, to within a chunk; no chunk holds text of
    two sources; and the text ends where the first source does.

    With a seed documents are shuffled: those of all sources together where there are no weights,
    those of each source by themselves where there are. A shuffle holds 10,000 documents or 64 Mi
    characters, whichever is less, gives one of them at random and takes in the next; and it reads
    a folder's files in random order. One seed gives one order, on every machine.

    Args:
        sources: Sources, or what Source() takes.
        seed: None for the order of the sources.

    Raises:
        ValueError: no source, or some have a weight and some have none.
    """

    def __init__(
        self,
        sources: Iterable[Source | str | os.PathLike[str] | Iterable[Any]],
        *,
        seed: int | None = None,
    ) -> None:
        if isinstance(sources, (str, os.PathLike, Source)):
            sources = [sources]
        self.sources = tuple(each if isinstance(each, Source) else Source(each) for each in sources)
        self.seed = seed
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {seed}")
        if not self.sources:
            raise ValueError("a mixture needs one source at least")
        given = [each.weight is not None for each in self.sources]
        if any(given) and not all(given):
            raise ValueError(
                f"{self.sources[given.index(False)].name or 'a source'} has no weight and "
                f"{self.sources[given.index(True)].name or 'another'} has one; give every source a "
                "weight, or none"
            )

    @property
    def weights(self) -> tuple[float, ...] | None:
        """The weights; None where the sources follow one another."""
        found = [each.weight for each in self.sources if each.weight is not None]
        return tuple(found) if len(found) > 1 else None

    @property
    def names(self) -> tuple[str, ...]:
        """The sources' names."""
        return tuple(each.name for each in self.sources)

    def check(self) -> None:
        """Find out now whether there is something to read; see Source.check."""
        for each in self.sources:
            each.check()

    def streams(self) -> list[Iterator[tuple[int, Item]]]:
        """Streams of documents, each with the number of its source: one a source with weights,
        one for all without. A document whose text is null is passed over.

        Raises (when iterated): as Source.documents does.
        """
        return [_usable(stream) for stream in self.found()]

    def found(self) -> list[Iterator[tuple[int, Found]]]:
        """streams(), of what Source.found gives. A shuffle lets errors and nulls pass at once, so
        that the order of the others is as if these were not there."""
        if self.weights is None:
            rng = self._rng("")
            both = itertools.chain.from_iterable(
                _numbered(index, each, rng) for index, each in enumerate(self.sources)
            )
            return [_shuffled(both, rng)]
        return [
            _shuffled(_numbered(index, each, rng), rng)
            for index, each in enumerate(self.sources)
            for rng in [self._rng(str(index))]
        ]

    def _rng(self, stream: str) -> random.Random | None:
        return None if self.seed is None else random.Random(f"{self.seed}/{stream}")

    def __repr__(self) -> str:
        seed = "" if self.seed is None else f", seed={self.seed}"
        return f"Mixture({list(self.sources)}{seed})"


def document(record: object, fields: Sequence[str], where: str) -> Item | None:
    """The document in a record: the first of `fields` that it has; None if they are all null.

    Args:
        record: a str, or a mapping with one of the fields.
        fields: names to look for.
        where: what to call the record in an error.

    Raises:
        ValueError: it has none of the fields, the field is neither text nor messages, or a message
            has no role.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise ValueError(
            f"{where}: expected a JSON object or string, found {type(record).__name__}"
        )
    name = next((each for each in fields if record.get(each) is not None), None)
    if name is None:
        if any(each in record for each in fields):
            return None
        raise _no_field(where, list(record), fields)
    value = record[name]
    if isinstance(value, bytes):  # a column of text that was not declared as such
        value = decoded(value, f"{where}: field {name!r}")
    if isinstance(value, str):
        if name not in CHAT_FIELDS or not value.lstrip().startswith("["):
            return value
        value = parsed_json(value.strip(), f"{where}: field {name!r}", field=True)
    if isinstance(value, list) and not value:
        raise ValueError(
            f"{where}: field {name!r} is an empty list; a chat needs at least one message"
        )
    if isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        return _chat(value, record, where)
    found = type(value).__name__
    if isinstance(value, list):
        found += (
            f" of {next(type(each).__name__ for each in value if not isinstance(each, Mapping))}"
        )
    raise ValueError(
        f"{where}: field {name!r} must be a text, or a list of messages, found {found}"
    )


def _chat(found: list[Any], record: Mapping[str, Any], where: str) -> Chat:
    variables = dict(_parsed(record, _VARIABLES, Mapping, where) or {})
    if (documents := _parsed(record, _DOCUMENTS, list, where)) is not None:
        variables.setdefault("documents", documents)
    tools = _parsed(record, _TOOLS, list, where) or None
    messages = messages_of(found, where)
    system = record.get(_SYSTEM)
    if isinstance(system, str) and system and messages[0].get("role") != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return Chat(messages, tools, variables)


def _parsed(record: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A field that may be spelled as JSON, as columns with mixed types often are."""
    value = record.get(name)
    if isinstance(value, str):
        told = f"{where}: field {name!r}"
        value = parsed_json(value, told, field=True) if value.strip() else None
    if value is not None and not isinstance(value, kind):
        raise ValueError(
            f"{where}: field {name!r} must be a {'list' if kind is list else 'mapping'}, found "
            f"{type(value).__name__}"
        )
    return value


def _no_field(where: object, names: Sequence[str], fields: Sequence[str]) -> ValueError:
    return ValueError(
        f"{where}: no field {' or '.join(map(repr, fields))}; it has "
        f"{', '.join(map(repr, names)) or 'none'}. Name the one with the text or the messages: "
        "--text-field NAME (fields=). If the text lies in several, as in 'instruction' and "
        "'output', make one of them first"
    )


# --- order ---------------------------------------------------------------------------------------


def _usable(stream: Iterator[tuple[int, Found]]) -> Iterator[tuple[int, Item]]:
    for index, found in stream:
        if found.error is not None:
            raise found.error
        if found.item is not None:
            yield index, found.item


def _numbered(index: int, source: Source, rng: random.Random | None) -> Iterator[tuple[int, Found]]:
    for found in source.found(rng):
        yield index, found


def _shuffled(
    items: Iterator[tuple[int, Found]], rng: random.Random | None
) -> Iterator[tuple[int, Found]]:
    if rng is None:
        yield from items
        return
    held: list[tuple[int, Found]] = []
    characters = 0
    for item in items:
        if item[1].item is None:
            yield item
            continue
        held.append(item)
        characters += _size(item[1].item)
        while len(held) >= _HELD_DOCUMENTS or characters >= _HELD_CHARACTERS:
            taken = _drawn(held, rng)
            characters -= _size(taken[1].item)
            yield taken
    while held:
        yield _drawn(held, rng)


def _drawn(held: list[tuple[int, Found]], rng: random.Random) -> tuple[int, Found]:
    index = _below(len(held), rng)
    held[index], held[-1] = held[-1], held[index]
    return held.pop()


def _permute(items: list[Path], rng: random.Random) -> None:
    for last in range(len(items) - 1, 0, -1):
        index = _below(last + 1, rng)
        items[index], items[last] = items[last], items[index]


def _below(n: int, rng: random.Random) -> int:
    # random() is the one method whose numbers no later Python may change (docs of `random`)
    return int(rng.random() * n)


def _size(item: Item | None) -> int:
    if isinstance(item, Chat):
        return sum(
            len(str(value))
            for message in item.messages
            if isinstance(message, Mapping)
            for value in message.values()
        )
    return len(item) if isinstance(item, Sized) else 0


def _values(batch: Any) -> Iterator[Any]:
    """The rows of a pyarrow.RecordBatch as mappings; the ValueError of one that cannot be such,
    because a text in it is not UTF-8, say."""
    try:
        yield from batch.to_pylist()
        return
    except ValueError:
        pass
    for row in range(batch.num_rows):
        try:
            (found,) = batch.slice(row, 1).to_pylist()
        except ValueError as error:
            found = error
        yield found
