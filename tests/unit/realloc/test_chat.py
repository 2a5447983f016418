"""Chat templates: the text that transformers' apply_chat_template makes, and nothing of the machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments import toy
from realloc.chat import ChatTemplate, TemplateError, read_chat_template
from realloc.errors import InputError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TURNS = """{{- bos_token }}
{%- set state = namespace(system='') %}
{%- if messages[0].role == 'system' %}
    {%- set state.system = messages[0].content | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- if tools is defined and tools %}
    {{- 'Tools: ' + (tools | tojson) }}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (state.system + '\n' if loop.first and state.system else '') }}
        {{- message.content + ' [/INST]' }}
    {%- else %}
        {%- generation %}
        {{- message.content + eos_token }}
        {%- endgeneration %}
    {%- endif %}
    {%- if message.content is not string %}{% continue %}{% endif %}
{%- endfor %}
"""
CONVERSATION = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "What is <b>ä</b>?"},
    {"role": "assistant", "content": "A letter."},
    {"role": "user", "content": "Sure?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": 'Ünit "x" <y>'}}]


def model(folder: Path, template: str, *, own_file: bool = False) -> Path:
    toy.write_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if own_file:
        (folder / "chat_template.jinja").write_text(template)
    else:
        settings["chat_template"] = template
    path.write_text(json.dumps(settings))
    return folder


def template_of(folder: Path) -> ChatTemplate:
    template = read_chat_template(folder)
    assert template is not None
    return template


@pytest.mark.parametrize("own_file", [False, True])
@pytest.mark.parametrize("text", [CHATML, TURNS], ids=["chatml", "turns"])
@pytest.mark.parametrize("begin", [False, True])
def test_texts_equal_those_of_transformers(tmp_path: Path, text: str, begin: bool, own_file: bool):
    from transformers import AutoTokenizer

    folder = model(tmp_path, text, own_file=own_file)
    oracle, template = AutoTokenizer.from_pretrained(str(folder)), template_of(folder)
    for tools in (None, TOOLS):
        expected = oracle.apply_chat_template(
            CONVERSATION, tools=tools, tokenize=False, add_generation_prompt=begin
        )
        assert template.render(CONVERSATION, add_generation_prompt=begin, tools=tools) == expected


def test_what_a_template_refuses_is_said(tmp_path: Path):
    template = template_of(model(tmp_path, TURNS))
    with pytest.raises(TemplateError, match="Roles must alternate"):
        template.render(CONVERSATION[1:2] * 2)
    with pytest.raises(TemplateError, match="refuses it"):
        template_of(model(tmp_path, CHATML)).render([{"role": "user"}])


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.getcwd() }}",
        "{{ messages.append(1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    ],
)
def test_a_template_sees_nothing_of_the_machine(tmp_path: Path, text: str):
    template = template_of(model(tmp_path, text))
    with pytest.raises(TemplateError):
        template.render(CONVERSATION)


def test_the_date_stands_still(tmp_path: Path):
    assert template_of(model(tmp_path, "{{ strftime_now('%d %b %Y') }}")).render([]) == "26 Jul 2024"


def test_bad_templates_are_named(tmp_path: Path):
    folder = model(tmp_path, "{% for m in messages %}\n{% if %}")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: the chat template, line 2"):
        read_chat_template(folder)
    with pytest.raises(InputError, match="cannot be read as a chat template"):
        read_chat_template(folder, str(tmp_path / "none.jinja"))


def test_templates_by_name_and_none(tmp_path: Path):
    settings: list[Any] = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    path = model(tmp_path, "") / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": settings}))
    assert template_of(tmp_path).render([]) == "a"
    path.write_text("{}")
    assert read_chat_template(tmp_path) is None
