"""Records of data sets as they occur, with every reader: what they render as, to the letter, and
which of them are refused, left out, or counted as empty."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import zstandard
from helpers.characters import Characters
from helpers.forge import ModelSpec
from helpers.running import Forged
from helpers.runs import Enough, saved, stop_at
from pyarrow import parquet

from imatrix import (
    Chat,
    ChatOptions,
    Cluster,
    Collector,
    ImportanceMatrix,
    Mixture,
    Source,
    TextSource,
    cli,
)
from imatrix.text.chats import Renderer
from imatrix.text.chunks import Chunks

# Calls as f(a=1;), then the properties of the tools, then the speakers with their texts
TEMPLATE = """\
{% for message in messages %}
{% for call in message.tool_calls or [] %}
{{ call.function.name }}({% for name, value in call.function.arguments.items() %}\
{{ name }}={{ value }};{% endfor %})
{% endfor %}
{% if message.content %}
{{ message.role }}: {{ message.content }}
{% endif %}
{% endfor %}
{% for tool in tools or [] %}
{{ tool.function.parameters.properties | tojson }}
{% endfor %}
"""
OPTIONS = ChatOptions(text=TEMPLATE)

Made = Callable[[list[Any]], Source]
OF_JSON = ["jsonl", "ndjson.gz", "jsonl.zst", "stdin", "iterable"]
PADDED = ["parquet", "hf", "data set", "streamed data set"]


def spelled(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def source_of(
    kind: str, data: bytes, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "data"
) -> Source:
    """The source is JSON lines in a file of that kind, or standard input."""
    if kind == "stdin":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
        return Source("jsonl:-")
    path = folder / f"{name}.{kind}"
    packed = {"ndjson.gz": gzip.compress, "jsonl.zst": zstandard.compress}
    path.write_bytes(packed[kind](data) if kind in packed else data)
    return Source(path)


@pytest.fixture
def of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[Any]], Source]:
    """A source of a kind with these records."""

    def made(kind: str, records: list[Any]) -> Source:
        if kind == "iterable":
            return Source(records)
        if kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(records), tmp_path / "data.parquet")
            return Source(tmp_path / "data.parquet")
        if kind == "hf":
            (tmp_path / "set").mkdir(exist_ok=True)
            (tmp_path / "set/train.jsonl").write_bytes(spelled(records))
            return Source(f"hf:{tmp_path / 'set'}")
        if kind.endswith("data set"):
            import datasets

            found = datasets.Dataset.from_list(records)
            return Source(found.to_iterable_dataset() if "streamed" in kind else found)
        return source_of(kind, spelled(records), tmp_path, monkeypatch)

    return made


@pytest.fixture(scope="module")
def render() -> Iterator[Renderer]:
    made = Renderer({}, str, OPTIONS, "model")
    yield made
    made.close()


def rendered(source: Source, render: Renderer) -> list[str]:
    """The documents as the text that a run makes from them."""
    found = Chunks(source, Characters(), 4096, packing="document", render=render)
    return ["".join(map(chr, chunk.tokens)) for chunk in found]


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}


def tool(**properties: Any) -> dict[str, Any]:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": "f", "parameters": parameters}}


# --- nulls that Arrow pads -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*OF_JSON, *PADDED])
def test_what_another_record_has_is_not_in_this_one(
    kind: str, of: Callable[[str, list[Any]], Source], render: Renderer
) -> None:
    records = [
        {"messages": [call(a="1")], "tools": [tool(a={"type": "string"})]},
        {"messages": [call(b="2")], "tools": [tool(b={"enum": ["x"]})]},
        # a struct in a list in a struct
        {"messages": [call(c=[{"d": 1}, {"e": {"f": 2}}])], "tools": None},
    ]
    assert rendered(of(kind, records), render) == [
        'f(a=1;)\n{"a": {"type": "string"}}\n',
        'f(b=2;)\n{"b": {"enum": ["x"]}}\n',
        "f(c=[{'d': 1}, {'e': {'f': 2}}];)\n",
    ]


def test_a_null_that_was_written(
    of: Callable[[str, list[Any]], Source], render: Renderer, tmp_path: Path
) -> None:
    """JSON lines can tell it from an absent field and keep it; a column cannot."""
    records = [{"messages": [call(a=None, b=[None, "x"])]}]
    for kind in OF_JSON:
        assert rendered(of(kind, records), render) == ["f(a=None;b=[None, 'x'];)\n"]
    for kind in PADDED:  # a list has the elements that were given
        assert rendered(of(kind, records), render) == ["f(b=[None, 'x'];)\n"]
    # a field of the message itself that is null is absent for every template, as in transformers
    records = [{"messages": [{"role": "user", "content": "hi", "tool_calls": None}]}]
    for kind in (*OF_JSON, *PADDED):
        assert rendered(of(kind, records), render) == ["user: hi\n"]


def test_maps_and_other_types_of_columns(tmp_path: Path, render: Renderer) -> None:
    """A map has the keys that were given, also those whose value is null."""
    arguments = pa.map_(pa.string(), pa.struct([("p", pa.int64()), ("q", pa.int64())]))
    function = pa.struct([("name", pa.large_string()), ("arguments", arguments)])
    one = pa.struct([("function", function)])
    calls = [{"function": {"name": "f", "arguments": [("a", {"p": 1, "q": None}), ("b", None)]}}]
    for listed in (pa.list_(one), pa.large_list(one), pa.list_(one, 1)):
        message = pa.struct([("role", pa.string()), ("tool_calls", listed)])
        rows = pa.array([[{"role": "assistant", "tool_calls": calls}]], pa.large_list(message))
        parquet.write_table(pa.table({"messages": rows}), tmp_path / "a.parquet")
        assert rendered(Source(tmp_path / "a.parquet"), render) == ["f(a={'p': 1};b=None;)\n"]
    names = pa.array(["x!", "y!", "x!"]).dictionary_encode()
    parquet.write_table(pa.table({"text": names}), tmp_path / "b.parquet")
    assert rendered(Source(tmp_path / "b.parquet"), render) == ["x!", "y!", "x!"]


# --- who speaks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*OF_JSON, *PADDED])
@pytest.mark.parametrize("field", ["conversations", "conversation", "messages"])
def test_sharegpt(
    kind: str, field: str, of: Callable[[str, list[Any]], Source], render: Renderer
) -> None:
    records = [
        {
            field: [
                {"from": "system", "value": "be brief"},
                {"from": "human", "value": "hi", "weight": None},
                {"from": "gpt", "value": "ho", "weight": 1},
            ],
            "system": None,
        },
        {field: [{"from": "human", "value": "x"}, {"from": "gpt", "value": ""}], "system": "s"},
    ]
    assert rendered(of(kind, records), render) == [
        "system: be brief\nuser: hi\nassistant: ho\n",
        "system: s\nuser: x\n",
    ]


@pytest.mark.parametrize(
    ("spelled", "role"),
    [
        *((name, "user") for name in ("human", "Human", "user", "prompter")),
        *((name, "assistant") for name in ("gpt", "GPT", "chatgpt", "bing", "bard", "assistant")),
        *((name, "assistant") for name in ("model", "bot")),
        ("system", "system"),
        *((name, "tool") for name in ("tool", "function_response", "observation", "function")),
    ],
)
def test_names_of_speakers(spelled: str, role: str, render: Renderer) -> None:
    said = {"value": "x"}, {"content": "x"}
    for more in said:
        for named in ({"from": spelled}, {"from": spelled, "role": None}):
            source = Source([{"conversations": [{**named, **more}]}])
            assert rendered(source, render) == [f"{role}: x\n"]
    source = Source([{"messages": [{"role": spelled, "value": "x"}]}])
    assert rendered(source, render) == [f"{role}: x\n"]


def test_roles_that_a_template_may_know_stay(render: Renderer) -> None:
    """Templates read `role` with `content`: only ShareGPT's own names are translated."""
    for given, role in (("human", "user"), ("gpt", "assistant"), ("observation", "observation")):
        source = Source([{"messages": [{"role": given, "content": "x"}]}])
        assert rendered(source, render) == [f"{role}: x\n"]


def test_calls_in_sharegpt(render: Renderer) -> None:
    for value in (
        {"name": "f", "arguments": {"a": 1}},
        [{"name": "f", "arguments": '{"a": 1}'}],
    ):
        said = [{"from": "function_call", "value": json.dumps(value)}]
        assert rendered(Source([{"conversations": said}]), render) == ["f(a=1;)\n"]
    said = [{"from": "function_call", "value": "f 1"}]
    assert rendered(Source([{"conversations": said}]), render) == ["assistant: f 1\n"]


def test_messages_as_json_in_a_string(
    of: Callable[[str, list[Any]], Source], render: Renderer
) -> None:
    records = [{"conversations": json.dumps([{"from": "human", "value": "x"}])}]
    for kind in ("jsonl", "parquet"):
        assert rendered(of(kind, records), render) == ["user: x\n"]


@pytest.mark.parametrize("kind", [*OF_JSON, *PADDED])
@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"messages": [{"content": "x"}]}, r"message 0 has no role; it has 'content'"),
        (
            {"messages": [{"role": "", "content": "x"}]},
            r"message 0 has the role '', which is no name",
        ),
        ({"messages": [{"role": "user", "text": "x"}]}, r"message 0 has no content; it has 'role'"),
        (
            {"messages": ["x"]},
            r"field 'messages' must be a text, or a list of messages, found list",
        ),
        ({"conversations": [{"value": "x"}]}, r"message 0 has no role; it has 'value'"),
        ({"conversations": [{"from": "eve", "value": "x"}]}, r"message 0 is from 'eve', which is"),
        ({"messages": []}, r"field 'messages' is an empty list; a chat needs at least one message"),
        ({"instruction": "x", "output": "y"}, r"no field .*; it has 'instruction', 'output'"),
        ({"prompt": "x", "completion": "y"}, r"no field .*; it has 'prompt', 'completion'"),
    ],
)
def test_what_is_refused(
    kind: str,
    record: dict[str, Any],
    told: str,
    of: Callable[[str, list[Any]], Source],
    render: Renderer,
) -> None:
    place = {
        "jsonl": r"data\.jsonl, line 1: ",
        "ndjson.gz": r"data\.ndjson\.gz, line 1: ",
        "jsonl.zst": r"data\.jsonl\.zst, line 1: ",
        "stdin": r"standard input, line 1: ",
        "parquet": r"data\.parquet(, row 0)?: ",
        "hf": r"hf:.*, record 0: ",
    }.get(kind, r"documents\[0\]: ")
    with pytest.raises(ValueError, match=place + told):
        rendered(of(kind, [record]), render)


# --- arguments of calls --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*OF_JSON, *PADDED])
def test_arguments_as_json_in_a_string(
    kind: str, of: Callable[[str, list[Any]], Source], render: Renderer
) -> None:
    function = {"name": "f", "arguments": '{"a": "1", "b": null}'}
    messages = [{"role": "assistant", "tool_calls": [{"function": function}]}]
    assert rendered(of(kind, [{"messages": messages}]), render) == ["f(a=1;b=None;)\n"]
    # any other value stays what it is: this template cannot use it
    function["arguments"] = "a = 1"
    with pytest.raises(
        ValueError, match=r"(line 1|row 0|record 0|documents\[0\]): .*template.*items"
    ):
        rendered(of(kind, [{"messages": messages}]), render)


def test_arguments_of_a_chat_given_in_python(render: Renderer) -> None:
    function = {"name": "f", "arguments": '{"a": "1"}'}
    chat = Chat([{"role": "assistant", "tool_calls": [{"function": function}]}])
    assert rendered(Source([chat]), render) == ["f(a=1;)\n"]
    assert function["arguments"] == '{"a": "1"}'


# --- BOM and surrogates --------------------------------------------------------------------------

BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("kind", OF_JSON[:-1])
def test_a_bom_before_json_lines(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # and between files that were joined
    data = BOM + b'{"text": "a"}\n' + BOM + b'{"text": "b"}\r\n' + BOM + b"\n"
    assert list(source_of(kind, data, tmp_path, monkeypatch).documents()) == ["a", "b"]


def test_a_bom_before_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = BOM + "a\ufeffb\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress(data))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    for at in (tmp_path / "a.txt", tmp_path / "a.txt.gz", tmp_path / "a.txt.zst", "-"):
        assert list(Source(at).documents()) == ["a\ufeffb"]
    expected = [[ord(each) for each in "a\ufeffb"]]
    for texts in (tmp_path / "a.txt", io.BytesIO(data), io.StringIO("\ufeffa\ufeffb\n")):
        found = Chunks(texts, Characters(), 8)
        assert [chunk.tokens.tolist() for chunk in found] == expected


@pytest.mark.parametrize("kind", OF_JSON)
def test_a_lone_surrogate(
    kind: str, of: Callable[[str, list[Any]], Source], render: Renderer
) -> None:
    function = {"name": "f", "arguments": {"\udc00": ["\ud83d"]}}
    said = [{"role": "user", "content": "x\udfff", "tool_calls": [{"function": function}]}]
    records = [
        {"text": "ab\ud83d cd"},
        {"text": "\U0001f600!"},  # a complete pair in JSON
        {"messages": said, "tools": [tool(**{"\ud800": "\ud800"})]},
    ]
    assert rendered(of(kind, records), render) == [
        "ab\ufffd cd",
        "\U0001f600!",
        'f(\ufffd=[\'\ufffd\'];)\nuser: x\ufffd\n{"\ufffd": "\ufffd"}\n',
    ]


def test_surrogates_in_what_python_gives(render: Renderer) -> None:
    chat = Chat([{"role": "user", "content": "a\ud83d"}])
    assert rendered(Source(["b\ude00", chat]), render) == ["b\ufffd", "user: a\ufffd\n"]
    for texts in ("ab\ud83d", ["ab\ud83d"]):
        found = Chunks(texts, Characters(), 8)
        assert [chunk.tokens.tolist() for chunk in found] == [[97, 98, 0xFFFD]]
    with_one = Renderer({}, str, ChatOptions(text="{{ '\\ud83d' }}ab"), "model")
    with with_one.template() as template:
        assert template.render([{"role": "user"}]) == "\ufffdab"


def test_side_files(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A template and tools with a BOM and a surrogate are read; an error in them names the file."""
    (tmp_path / "chat.jsonl").write_bytes(
        spelled([{"messages": [{"role": "user", "content": "the river and the stone " * 20}]}])
    )
    template, tools = tmp_path / "t.jinja", tmp_path / "tools.json"

    def run(template_data: bytes, tools_data: bytes) -> tuple[int, str]:
        template.write_bytes(template_data)
        tools.write_bytes(tools_data)
        files = ["-f", tmp_path / "chat.jsonl", "-o", tmp_path / "out.gguf", "--restart"]
        side = ["--chat-template-file", template, "--chat-tools", tools]
        status = cli.main(
            ["collect", "-m", str(model), "-c", "32", "-t", "1", "--no-ppl"]
            + [str(each) for each in (*files, *side)]
        )
        return status, capfd.readouterr().err

    good = b"{{ tools[0].function.parameters.properties.x }}{{ messages[0].content }}"
    some = spelled([[tool(x="\ud83d!")]])
    status, err = run(good, some)
    assert status == 0, err
    plain = ImportanceMatrix.load(tmp_path / "out.gguf")
    status, err = run(BOM + good.replace(b"}}{{", b"}}{{"), BOM + some)
    assert status == 0, err
    with_bom = ImportanceMatrix.load(tmp_path / "out.gguf")
    assert plain.provenance is not None
    assert with_bom.provenance is not None
    assert plain.provenance.dataset_digest == with_bom.provenance.dataset_digest
    for template_data, tools_data, told in (
        (b"\xff", some, "t.jinja: not utf-8 text: byte 0xff at offset 0"),
        (good, b"[\xe9]", "tools.json: not utf-8 text: byte 0xe9 at offset 1"),
        (good, b"[\n1,]", "tools.json: not JSON: "),
        (good, b"[" * 100_000, "tools.json: n"),  # nested too deeply, or not JSON
        (good, b"{}", "tools.json: expected a JSON list of tools, found dict"),
    ):
        status, err = run(template_data, tools_data)
        assert status == 2, err
        assert told in err


# --- empty, and bad ------------------------------------------------------------------------------


def tallied(source: Source, render: Renderer | None = None, **options: Any) -> tuple[Any, ...]:
    found = Chunks(source, Characters(), 64, packing="document", render=render, **options)
    texts = ["".join(map(chr, chunk.tokens)) for chunk in found]
    (tally,) = found.tallies
    return texts, tally.documents, tally.empty, tally.skipped


@pytest.mark.parametrize("kind", [*OF_JSON, *PADDED])
def test_empty_documents_are_counted(
    kind: str, of: Callable[[str, list[Any]], Source], render: Renderer
) -> None:
    nothing = [{"role": "user", "content": ""}, {"role": "assistant", "content": " \n"}]
    records = [
        {"text": "ab", "messages": None},
        {"text": None, "messages": None},
        {"text": "", "messages": None},
        {"text": None, "messages": nothing},
        {"text": "cd", "messages": None},
    ]
    assert tallied(of(kind, records), render) == (["ab", "cd"], 2, 3, 0)


def test_a_column_with_nulls_keeps_the_order_of_a_shuffle() -> None:
    texts = [str(n) * 2 for n in range(10, 40)]
    holes = [{"text": each} for text in texts for each in (None, text)] + [{"body": "x"}]

    def order(source: Source, **options: Any) -> list[list[int]]:
        found = Chunks(Mixture([source], seed=5), Characters(), 8, packing="document", **options)
        return [chunk.tokens.tolist() for chunk in found]

    assert order(Source(holes), on_bad_record="skip") == order(Source(texts))


BAD = [
    b"{",
    b"[1]",
    b"null",
    b"17",
    b'{"text": 5}',
    b'{"text": [1]}',
    b'{"text": "\xe9"}',
    b'{"body": "x"}',
    b'{"messages": []}',
    b'{"messages": [{"content": "x"}]}',
    b'{"messages": [null]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": "["}',
    b'{"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"messages": 1}}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "x"}}]}]}',
    b'{"text": ' + b"1" * 5000 + b"}",  # more digits than Python converts
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    # few enough levels for the parser, but too many for a template's process
    b'{"messages": [{"role": "user", "content": ' + b"[" * 900 + b'"x"' + b"]" * 900 + b"}]}",
]


@pytest.mark.parametrize("kind", OF_JSON[:-1])
def test_every_bad_record_is_named_and_can_be_skipped(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, render: Renderer
) -> None:
    place = "standard input" if kind == "stdin" else str(tmp_path / f"data.{kind}")
    bad = BAD if kind == "jsonl" else BAD[:-2]
    for record in bad:
        data = b'{"text": "ab"}\n\n' + record + b'\n{"text": "cd"}\n'
        source = source_of(kind, data, tmp_path, monkeypatch)
        if record is not BAD[-1]:  # the allowed depth is up to Python
            with pytest.raises(ValueError, match=r"line 3: ") as raised:
                tallied(source, render)
            assert str(raised.value).startswith(f"{place}, line 3: ")
        source = source_of(kind, data, tmp_path, monkeypatch)
        texts, documents, empty, skipped = tallied(source, render, on_bad_record="skip")
        if record is not BAD[-1]:
            assert (texts, documents, empty, skipped) == (["ab", "cd"], 2, 0, 1)
        assert (texts[0], texts[-1]) == ("ab", "cd")


def test_bad_rows_of_parquet(tmp_path: Path, render: Renderer) -> None:
    # a text column that holds bytes which are no text; Arrow does not check
    data = pa.array([b"ab", b"\xe9", b"cd", None], pa.binary())
    for column in (data, pa.StringArray.from_buffers(4, *data.buffers()[1:], data.buffers()[0])):
        path = tmp_path / "a.parquet"
        parquet.write_table(pa.table({"text": column}), path)
        with pytest.raises(ValueError, match=r"a\.parquet, row 1: .*0xe9"):
            tallied(Source(path))
        assert tallied(Source(path), on_bad_record="skip") == (["ab", "cd"], 2, 1, 1)


def test_bad_items_of_an_iterable(render: Renderer) -> None:
    items = ["ab", 5, b"x", None, {"body": 1}, [-1], Chat([]), Chat([{"content": 1}]), [99, 100]]
    for bad in (items[1], items[2], *items[4:8]):
        with pytest.raises((ValueError, TypeError), match=r"^mine\[1\]"):
            tallied(Source(["ab", bad], name="mine"), render)
    assert tallied(Source(items), render, on_bad_record="skip") == (["ab", "cd"], 2, 1, 6)
    chats = [Chat([{"role": "user", "content": "ab"}]), Chat([{"content": "x"}])]
    found = Chunks(chats, Characters(), 64, packing="document", render=render)
    with pytest.raises(ValueError, match=r"^texts\[1\]: message 0 has no role"):
        list(found)


def test_a_text_that_the_tokenizer_refuses(tmp_path: Path) -> None:
    class Choosy(Characters):
        def tokenize(self, text: str, **options: Any) -> Any:
            if "!" in text:
                raise ValueError("no such token")
            return super().tokenize(text, **options)

    path = tmp_path / "a.jsonl"
    path.write_bytes(spelled(["ab", "c!", "d\0"]))
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: no such token"):
        list(Chunks(Source(path), Choosy(), 8))
    found = Chunks(Source(path), Choosy(), 8, on_bad_record="skip")
    assert [chunk.tokens.tolist() for chunk in found] == [[97, 98, 100, 0]]


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name, data in (("a.txt", b"ab"), ("b.txt", b"\xff"), ("c.txt", b"cd")):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"b\.txt: not utf-8 text: byte 0xff at offset 0"):
        tallied(Source(tmp_path))
    assert tallied(Source(tmp_path), on_bad_record="skip") == (["ab", "cd"], 2, 0, 1)
    # neither the end of the file is known, nor what comes after it
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "x"}\n' * 99, mtime=0)[:-9])
    with pytest.raises(ValueError, match=r"d\.jsonl\.gz: damaged or cut short"):
        tallied(Source(tmp_path), on_bad_record="skip")


def test_what_is_wrong_for_every_record_is_not_skipped() -> None:
    chats = [Chat([{"role": "user", "content": "ab"}])]
    for options, told in (
        (ChatOptions(), "has no chat template"),
        (ChatOptions(text="{% if %}"), "line 1"),
        (ChatOptions(text="x", variables={"tools": []}), "cannot be among"),
    ):
        made = Renderer({}, str, options, "model")
        with pytest.raises(ValueError, match=told):
            tallied(Source(chats), made, on_bad_record="skip")
        made.close()
    with pytest.raises(ValueError, match=r"no tokens: .*; 0 document\(s\) are empty and 1 record"):
        tallied(Source([{"body": 1}]), on_bad_record="skip")
    with pytest.raises(ValueError, match="on_bad_record must be 'stop' or 'skip', got 'go'"):
        tallied(Source(["ab"]), on_bad_record="go")


# --- runs ----------------------------------------------------------------------------------------

N_CTX = 32


@pytest.fixture(scope="module")
def small(forged: Forged) -> ModelSpec:
    return forged("llama", seed=2)


def collector(spec: ModelSpec) -> Collector:
    return Collector(spec.path, n_ctx=N_CTX, n_threads=1, rehearse=False)


def test_the_engines_tokenizer_on_odd_texts(small: ModelSpec, prose: str, tmp_path: Path) -> None:
    """A NUL is a character like others. Text that the tokenizer refuses is named and can be
    skipped."""
    path = tmp_path / "odd.jsonl"
    path.write_bytes(spelled([prose[:300], prose[:9] + "\0" + prose[9:300], "x" * 20_000_000]))
    with collector(small) as made:
        with pytest.raises(
            ValueError, match=r"odd\.jsonl, line 3: the text has 20000000 bytes in a"
        ):
            made.run(Source(path))
        made.run(Source(path), on_bad_record="skip")
        source = made.report.sources[0]
    assert (source.documents, source.skipped) == (2, 1)


def holed(tmp_path: Path, prose: str) -> Path:
    """Twelve texts; a bad record before the fifth and the ninth, an empty one before the third."""
    path = tmp_path / "holes.jsonl"
    with path.open("w") as file:
        for n in range(12):
            if n in (4, 8):
                file.write('{"body": 1}\n')
            if n == 2:
                file.write('{"text": null}\n')
            file.write(json.dumps({"text": prose[n * 200 : n * 200 + 200]}) + "\n")
    return path


def test_a_run_that_skips(small: ModelSpec, prose: str, tmp_path: Path) -> None:
    path = holed(tmp_path, prose)
    texts = [prose[n * 200 : n * 200 + 200] for n in range(12)]
    with collector(small) as made:
        expected = made.run(Source(texts, name=str(path)))
        clean = made.report.sources[0]
        with pytest.raises(ValueError, match=r"holes\.jsonl, line 6: no field"):
            made.run(Source(path))
        matrix = made.run(Source(path), on_bad_record="skip")
        report = made.report
    assert dict(matrix) == dict(expected)
    assert (clean.documents, clean.empty, clean.skipped) == (12, 0, 0)
    told = TextSource(str(path), 12, clean.tokens, clean.dropped, None, 1, 2)
    assert report.sources == (told,)
    assert f"{path}: 1 of 15 document(s) (6.7%) are empty: without a text, or chats" in "\n".join(
        report.lines()
    )
    assert f"{path}: 2 of 15 record(s) (13.3%) skipped: they could not be used" in report.lines()
    assert any(
        line.startswith(f"the first of them: {path}, line 6: no field") for line in report.lines()
    )
    # in the file, and if only one of two matrices has them
    matrix.save(tmp_path / "m.gguf")
    loaded = ImportanceMatrix.load(tmp_path / "m.gguf")
    assert loaded.provenance is not None
    assert loaded.provenance.sources == (told,)
    both = (loaded + loaded).provenance
    assert both is not None
    assert [(each.empty, each.skipped) for each in both.sources] == [(2, 4)]
    # the file has no key for them if the text has none
    from gguf import GGUFReader

    expected.save(tmp_path / "e.gguf")
    keys = {name: set(GGUFReader(tmp_path / f"{name}.gguf").fields) for name in "me"}
    assert keys["m"] - keys["e"] == {
        "imatrix.collector.sources.empty",
        "imatrix.collector.sources.skipped",
    }


@pytest.mark.parametrize("seed", [None, 4])
def test_going_on(small: ModelSpec, prose: str, tmp_path: Path, seed: int | None) -> None:
    path = holed(tmp_path, prose)

    def texts() -> Mixture:
        return Mixture([Source(path)], seed=seed)

    with collector(small) as made:
        whole = saved(made.run(texts(), on_bad_record="skip"), tmp_path)
        report = made.report
    for n in (1, 9, 30):
        checkpoint = tmp_path / f"{n}.checkpoint"
        with collector(small) as made, pytest.raises(Enough):
            made.run(texts(), on_bad_record="skip", checkpoint=checkpoint, progress=stop_at(n))
        with collector(small) as made:
            with pytest.raises(ValueError, match="on_bad_record is skip there and absent here"):
                made.run(texts(), checkpoint=checkpoint)
            again = made.run(texts(), on_bad_record="skip", checkpoint=checkpoint)
            assert saved(again, tmp_path) == whole
            assert made.report == report


def test_a_run_that_a_bad_record_ended_goes_on_without_it(
    small: ModelSpec, prose: str, tmp_path: Path
) -> None:
    """Up to that point the two are one run."""
    path, checkpoint = holed(tmp_path, prose), tmp_path / "checkpoint"
    with collector(small) as made:
        whole = saved(made.run(Source(path), on_bad_record="skip"), tmp_path)
        with pytest.raises(ValueError, match=r"line 6: no field"):
            made.run(Source(path), checkpoint=checkpoint)
        resumed: list[int] = []
        again = made.run(
            Source(path),
            on_bad_record="skip",
            checkpoint=checkpoint,
            progress=lambda progress: resumed.append(progress.resumed),
        )
        assert saved(again, tmp_path) == whole
        assert resumed[0] > 0


def test_on_a_cluster(small: ModelSpec, prose: str, tmp_path: Path) -> None:
    path = holed(tmp_path, prose)
    with collector(small) as made:
        made.run(Source(path), on_bad_record="skip")
        expected = made.report
        with Cluster("local:1", block=4) as cluster:
            matrix = made.run(Source(path), on_bad_record="skip", cluster=cluster)
        assert made.report == expected
        assert matrix.provenance is not None
        assert [(each.empty, each.skipped) for each in matrix.provenance.sources] == [(1, 2)]


def test_the_command(
    model: Path, prose: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = holed(tmp_path, prose)
    command = ["collect", "-m", str(model), "-c", "32", "-b", "32", "-t", "1", "--no-ppl"]
    command += ["-f", str(path), "-o", str(tmp_path / "out.gguf")]
    assert cli.main(command) == 2
    assert f"{path}, line 6: no field" in capfd.readouterr().err
    assert cli.main([*command, "--on-bad-record", "skip"]) == 0
    err = capfd.readouterr().err
    assert f"{path}: 2 of 15 record(s) (13.3%) skipped" in err
    assert f"the first of them: {path}, line 6: no field" in err
    assert cli.main(["show", str(tmp_path / "out.gguf")]) == 0
    assert "1 empty document, 2 bad records skipped" in capfd.readouterr().out
