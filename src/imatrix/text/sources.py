"""Where text comes from: files of several formats, folders, data sets, and iterables.

A source gives documents: texts, token ids, or chats that the model's template has yet to render.
imatrix.text.mixtures puts several sources together.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from imatrix.text.documents import BESIDE_MESSAGES, FIELDS, Found, Item, document, no_field_error
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
    import_zstandard,
    kind_of,
    open_parquet,
    opened,
    rows_of,
    unpacked_name,
)
from imatrix.text.records import unpadded, unpadding
from imatrix.text.shuffling import permute

__all__ = ["Source"]


_WEIGHT = re.compile(r"(.+):(\d+(?:\.\d*)?|\.\d+)")
_PREFIX = re.compile(r"(text|jsonl|parquet|hf):(.+)", re.DOTALL)


class Source:
    """One place that documents come from.

    Args:
        at: one of

            - a path: a file, or a folder. The files of a folder and of its subfolders are read in
              the order of their names (.txt .text .md .jsonl .ndjson .parquet, and .gz or .zst of
              all but the last); hidden ones are passed over;
            - "-": standard input;
            - "hf:NAME[:CONFIG][/SPLIT]": a Hugging Face dataset, streamed by the datasets library;
              SPLIT is train if it is not given. NAME is USER/DATASET, a DATASET without a user
              ("hf:wikitext:/test" for its split), or a folder that starts with / or .;
            - "text:…", "jsonl:…", "parquet:…": a path or "-", read in that format whatever its
              name is;
            - an iterable of documents: texts, Chats, records (mappings), or lists of token ids.

            The name of a file tells how to read it: as JSON lines, as Parquet, and everything else
            as one document of plain UTF-8 text, without one newline at its end, as
            llama-imatrix -f does; .gz and .zst are unpacked.
        weight: share of the tokens in a Mixture, relative to the other sources' weights.
        fields: fields of a record that may hold its text or its messages; the first that the record
            has counts. A field that is a list of messages makes a Chat, with the record's `tools`,
            `documents`, `system` (put in front as a system message, unless there is one) and
            `chat_template_kwargs`. Messages have `role` and `content`, or ShareGPT's `from` and
            `value`. A record whose field is null is an empty document.
        name: what to call the source in reports and files; None for what `at` says.

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

        If the whole text names an existing file, it is that file, whatever colons it has.

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
        """The file, if this is one file of plain text; None for everything else."""
        if self._items is not None or self._at == STDIN or Path(self._at).is_dir():
            return None
        path = Path(self._at)
        kind = self._kind or kind_of(path)
        return path if kind == "text" and path.suffix not in PACKED else None

    @property
    def at(self) -> str:
        """The path, "-", or the name of the data set; "" for an iterable."""
        return self._at

    def check(self) -> None:
        """Find out now whether there is something to read.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: a folder has no file to read, or Parquet is to come from standard input.
            ImportError: the library that reads the format is not installed.
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
                open_parquet(path)
            elif path.suffix == ".zst":
                import_zstandard(path)

    def files(self) -> list[Path | None]:
        """The files that are read, None for standard input. An iterable has none, nor has a data
        set that is not a local folder.

        Raises:
            OSError: a folder cannot be listed.
            ValueError: it has no file to read.
        """
        if self._items is not None:
            return []
        if self._kind == "hf":
            folder = Path(dataset_of(self._at)[0])
            # the library decides which of them it reads
            return [Path(at, name) for at, _, names in os.walk(folder) for name in names]
        return [path for path, _ in self._files(None)]

    def would_read(self, path: Path) -> bool:
        """Whether a new file would be read, because it lies in the folder that this source is."""
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
        """The documents, lazily and in order, without those whose text is null. The files of a
        folder come in an order drawn from `shuffled_by`, if that is given.

        Raises:
            ValueError: a record cannot be understood, a text is not UTF-8, or data are damaged; the
                message has file and line.
            OSError: a file cannot be read.
            ImportError: the library that reads the format is not installed.
        """
        for found in self.found(shuffled_by):
            if found.error is not None:
                raise found.error
            if found.item is not None:
                yield found.item

    def found(self, shuffled_by: random.Random | None = None) -> Iterator[Found]:
        """The same, with the documents whose text is null, and with the records that cannot be used:
        these have their error, which documents() raises. What ends a whole file is raised here too.
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
        # the datasets library pads its records as Parquet does
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
        """The files, and how to read each; the path None is standard input."""
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
            permute(found, shuffled_by)
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
                # if the file was put together from others, each of these may begin with a BOM
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
        file = open_parquet(path)
        names = file.schema_arrow.names
        wanted = [*self.fields, *BESIDE_MESSAGES]
        if not any(name in names for name in self.fields):
            raise no_field_error(path, names, self.fields)
        columns = [name for name in names if name in wanted]
        convert = {name: unpadding(file.schema_arrow.field(name).type) for name in columns}
        number = 0
        with file:
            for batch in file.iter_batches(batch_size=256, columns=columns):
                for row in rows_of(batch):
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
            except Exception as error:  # what the library's builders raise has no common type
                raise ValueError(
                    f"{self.name}: cannot be read from record {number} on: {error}"
                ) from error
            if record is None:
                return
            yield self._record(record, f"{self.name}, record {number}", padded=True)

    def __repr__(self) -> str:
        weight = "" if self.weight is None else f", weight={self.weight}"
        return f"Source({self.name!r}{weight})"
