"""Chat templates are rendered as transformers renders them, and kept within their limits.

The templates were written for this test in the style of well-known models: what matters is that
each uses other parts of the language.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers.forge import ModelSpec, make_model

from imatrix import Chat, ChatOptions, ChatTemplate, Collector, TemplateError
from imatrix.text.template import DATE

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

TEMPLATES = {
    "chatml": """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
""",
    "headers and the date": """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start|>system<|end|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" + system_message + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start|>' + message['role'] + '<|end|>\\n\\n' + message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception("one tool call at a time") }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{- "}" }}
    {%- else %}
        {{- "<|start|>ipython<|end|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}
""",
    "tools in the system message": """\
{% macro described(tool) -%}
{{ tool.function.name }}({% for name, kind in tool.function.parameters.properties.items() -%}
{{ name }}: {{ kind.type }}{{ ", " if not loop.last }}
{%- endfor %}) - {{ tool.function.description | default('?', true) }}
{%- endmacro %}
{% if tools %}
<tools>
{% for tool in tools %}
{{ described(tool) }}
{{ tool | tojson(indent=2) }}
{{ tool | tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}
{% endfor %}
</tools>
{% endif %}
{% set ns = namespace(last_query=messages | length - 1, open=false) %}
{% for message in messages[::-1] %}
{% set index = (messages | length - 1) - loop.index0 %}
{% if not ns.open and message.role == 'user' and message.content is string
      and not message.content.startswith('<tool_response>') %}
{% set ns.open = true %}
{% set ns.last_query = index %}
{% endif %}
{% endfor %}
{% for message in messages %}
{% if message.content is string %}{% set content = message.content %}{% else %}{% set content = '' %}{% endif %}
{% if message.role == 'assistant' %}
{% if message.reasoning_content is defined and loop.index0 > ns.last_query %}
<think>{{ message.reasoning_content.strip('\\n') }}</think>
{% elif '</think>' in content %}
{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{% endif %}
{{ content }}
{% for call in message.tool_calls or [] %}
<tool_call>{{ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}</tool_call>
{% endfor %}
{% else %}
[{{ message.role | upper }}] {{ content }}
{% endif %}
{% endfor %}
""",
    "turns must alternate": """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{% if message.role == 'tool' %}{% break %}{% endif %}
{% if message.role == 'user' %} [INST] {{ message.content }} [/INST]
{% elif message.role == 'assistant' %}
{% generation %} {{ message.content or 'calls' }}{{ eos_token }}{% endgeneration %}
{% else %}{{ raise_exception('roles must alternate user/assistant, not ' ~ message.role) }}{% endif %}
{% endfor %}""",
    "documents and variables": """\
{% if documents %}{% for document in documents %}<doc {{ loop.index }}>{{ document.text }}</doc>
{% endfor %}{% endif %}{% set seen = dict(user=0) %}{% for message in messages %}
{{ message.role }}:{{ message.thinking | default('') }}:
{% for part in (message.content if message.content is not string else [{'text': message.content}]) or [] %}
{{ part.text }}{% endfor %}
{% endfor %}{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}
{{ unset_name }}{{ pad_token }}{{ [3, 1, 2] | sort | join('-') }}{{ '%02d' | format(7) }}""",
}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "How it is outside <now> & soon, Zürich included",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer", "enum": [1, 2]},
                },
                "required": ["city"],
            },
        },
    }
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <3"}}}

CHATS: dict[str, dict[str, Any]] = {
    "plain": {
        "messages": [
            {"role": "user", "content": "  Hello & <goodbye> 'there'  "},
            {"role": "assistant", "content": "Grüß\ndich"},
            {"role": "user", "content": "{{ 7 * 7 }}"},
        ]
    },
    "system": {
        "messages": [
            {"role": "system", "content": " be brief "},
            {"role": "user", "content": "why?"},
        ]
    },
    "tools": {
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": '{"sky": "<blue>"}'},
            {"role": "assistant", "content": "blue", "thinking": "\nthe sky\n"},
        ],
        "tools": TOOLS,
    },
    "documents and parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "one"}, {"text": "two"}]},
            {"role": "assistant", "content": "ok", "reasoning": "hm"},
        ],
        "documents": [{"title": "t", "text": "first"}, {"title": "u", "text": "second"}],
        "enable_thinking": False,
    },
}


class _Clock(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
        return DATE


@pytest.fixture(scope="module")
def theirs() -> Iterator[Any]:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from transformers.utils import chat_template_utils

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})), **SPECIAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template_utils, "datetime", _Clock)
        yield made


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(theirs: Any, name: str) -> None:
    rendered = failed = 0
    with ChatTemplate(TEMPLATES[name], variables=SPECIAL) as template:
        for chat in CHATS.values():
            for prompt in (False, True):
                given = {**chat, "add_generation_prompt": prompt}
                messages = given.pop("messages")
                try:
                    expected = theirs.apply_chat_template(
                        messages, chat_template=TEMPLATES[name], tokenize=False, **given
                    )
                except Exception:
                    # the template reads a field that the chat lacks: here it is absent as well
                    with pytest.raises(TemplateError):
                        template.render(messages, **given)
                    failed += 1
                    continue
                assert template.render(messages, **given) == expected
                rendered += 1
    assert rendered >= 4  # of 8


def test_the_clock_and_the_dice_are_still() -> None:
    text = "{{ strftime_now('%Y-%m-%d') }} {{ range(1000) | random }}"
    found = []
    for _ in range(2):
        with ChatTemplate(text) as template:
            found += [template.render([{"role": "user"}]) for _ in range(2)]
    assert len(set(found)) == 1
    assert found[0].startswith("2025-01-01 ")
    with ChatTemplate(text, now=datetime(2031, 2, 3)) as template:
        assert template.render([{"role": "user"}]).startswith("2031-02-03 ")


@pytest.mark.parametrize(
    ("text", "told", "line"),
    [
        ("a\n{% if %}", "Expected an expression", 2),
        ("a\nb\n{{ raise_exception('no tools here') }}", "no tools here", 3),
        ("\n{{ messages[0].a.b }}", "has no attribute 'a'", 2),
        (
            "{{ ''.__class__.__mro__ }}",
            "access to attribute '__class__' of 'str' object is unsafe",
            1,
        ),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe", 1),
        ("\n{% set ns = namespace(_x=1) %}", "underscored name '_x'", 2),
        ("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", "calls itself too deeply", 2),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big", 1),
        (
            "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
            "writes more than 16777216 characters",
            None,
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "not done after 1 seconds",
            None,
        ),
    ],
)
def test_errors_name_template_and_line(text: str, told: str, line: int | None) -> None:
    # on a busy machine only the case that is to run out of time may do so
    seconds = 1 if "not done" in told else 60
    with ChatTemplate(text, name="model.gguf: chat template 'x'", seconds=seconds) as template:
        for _ in range(2):  # also after an error
            with pytest.raises(TemplateError, match=told) as caught:
                template.render([{"role": "user"}])
            assert caught.value.line == line
            assert str(caught.value).startswith("model.gguf: chat template 'x'")


def test_memory_has_an_end() -> None:
    if not Path("/proc/self/statm").exists():
        return  # the limit is Linux's
    with (
        ChatTemplate("{{ ('x' * 2**40) | length }}") as template,
        pytest.raises(TemplateError, match="too much memory"),
    ):
        template.render([{"role": "user"}])


# --- a model's own -------------------------------------------------------------------------------


# a comment comes first, to see that the template comes out of the file unchanged
DEFAULT = (
    '{# "größer"\\n\n\t#}{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}'
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}go{% endif %}"
)


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    """A model with two templates, spelled with characters that the tiny tokenizer knows."""
    folder = tmp_path_factory.mktemp("chatty")
    return make_model(
        folder / "chatty.gguf",
        "llama",
        seed=3,
        metadata={
            "tokenizer.chat_template": DEFAULT,
            "tokenizer.chat_template.tool_use": "tools {{ tools | length }} "
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ style }}",
            "tokenizer.chat_templates": ["tool_use"],
        },
    )


def test_special_tokens_are_parsed_and_the_template_is_chosen(chatty: ModelSpec) -> None:
    assert chatty.tokenizer is not None
    bos = chatty.tokenizer.bos
    eos = bos + 1
    talk = Chat([{"role": "user", "content": "the river"}, {"role": "assistant", "content": "is"}])
    tools = Chat(talk.messages, tools=TOOLS)

    def ran(chats: list[Chat], options: ChatOptions | None = None) -> list[int]:
        with Collector(chatty.path, n_ctx=512, n_threads=1, rehearse=False) as made:
            from imatrix.text.chunks import Chunks

            render = made._models.renderer(options or ChatOptions())
            found = [
                chunk.tokens.tolist()
                for chunk in Chunks(
                    chats, made._models.tokenizer(), 512, packing="document", render=render
                )
            ]
            render.close()
        assert len(found) == 1
        return found[0]

    user = chatty.encode("user: the river")
    said = [bos, *user, eos, *chatty.encode("assistant: is"), eos]
    assert ran([talk]) == said
    assert ran([talk], ChatOptions(generation_prompt=True)) == [*said, *chatty.encode("go")]
    system = chatty.encode("system: be")
    assert ran([talk], ChatOptions(system="be")) == [bos, *system, eos, *said[1:]]
    assert ran([tools]) == chatty.encode("tools 1 the riveris")
    assert ran([talk], ChatOptions(tools=TOOLS, variables={"style": "x"})) == chatty.encode(
        "tools 1 the riverisx"
    )
    assert ran([tools], ChatOptions(template="default")) == said
    assert ran([talk], ChatOptions(text="{{ messages | length }}2")) == chatty.encode("22")


def test_names_that_a_chat_has_by_itself(chatty: ModelSpec) -> None:
    chat = Chat([{"role": "user", "content": "x"}], variables={"tools": [], "self": 1})
    with (
        Collector(chatty.path, n_ctx=32, n_threads=1, rehearse=False) as made,
        pytest.raises(ValueError, match=r"'tools' cannot be among a template's further names"),
    ):
        made.run([chat])
    with ChatTemplate("{{ self }}{{ x }}") as template:  # in Jinja, `self` belongs to the template
        assert template.render([{"role": "user"}], x=5).endswith("5")


def test_the_models_template_by_name(chatty: ModelSpec) -> None:
    with Collector(chatty.path, n_ctx=32, n_threads=1) as made:
        with made.chat_template() as template:
            assert template.text == DEFAULT
            text = template.render([{"role": "user", "content": "x"}], add_generation_prompt=True)
        assert text == "<|begin|>user: x<|endoftext|>go"
        with pytest.raises(
            TemplateError, match=r"no chat template 'rag'; it has 'default', 'tool_use': name one"
        ):
            made.chat_template("rag")


def test_a_model_without_a_template(chatty: ModelSpec, tmp_path: Path) -> None:
    plain = make_model(tmp_path / "plain.gguf", "llama", seed=3)
    chat = [Chat([{"role": "user", "content": "x"}])]
    with Collector(plain.path, n_ctx=32, n_threads=1, rehearse=False) as made:
        with pytest.raises(
            TemplateError, match=r"plain\.gguf has no chat template .* and the text"
        ):
            made.run(chat)
        assert made.run(chat, chat=ChatOptions(text="{{ messages[0].content * 9 }}")).chunk_count
    # an error in a chat is reported with the template's line
    with (
        Collector(chatty.path, n_ctx=32, n_threads=1, rehearse=False) as made,
        pytest.raises(
            TemplateError, match=r"chatty\.gguf: chat template 'tool_use', line 1: .*None"
        ),
    ):
        made.run(chat, chat=ChatOptions(template="tool_use"))


def test_values_that_are_not_json(theirs: Any) -> None:
    class Odd:
        pass

    text = "{{ messages[0].content }} {{ messages[0].when }} {{ messages[0].n | tojson }}"
    message = {"role": "user", "content": Odd(), "when": datetime(2020, 1, 1), "n": (1, 2.5, None)}
    with ChatTemplate(text) as template:
        assert template.render([message]) == theirs.apply_chat_template(
            [message], chat_template=text, tokenize=False
        )
