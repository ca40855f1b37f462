"""Chat templates that mean harm are refused in a sentence, and harmless ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from polylens.errors import ConfigError
from polylens.prompts import PromptFormat, choose_format
from tiny import CHAT_TEMPLATE, tiny_tokenizer

# Each of them keeps whoever renders it busy, or takes all memory.
GREEDY = {
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}"
    "{% if a == b %}{% endif %}{% endfor %}{% endfor %}",
    "a doubled text": "{% set n = namespace(x='ab') %}{% for _ in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "a repeated text": "{% set x = 'ab' * 10 ** 11 %}",
    "a power": "{% set n = namespace(x=3) %}{% for _ in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "a wide format": "{{ '%100000000000d' % 1 }}",
    "a long output": "{% for _ in range(9999) %}{{ 'a' * 9999 }}{% endfor %}",
    "in a tag of transformers": "{% generation %}{% for _ in range(9999) %}{{ 'a' * 9999 }}"
    "{% endfor %}{% endgeneration %}",
}

# jinja's sandbox ends each of these.
FORBIDDEN = {
    "a huge range": "{% for _ in range(10**9) %}{% endfor %}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['os'] }}",
    "a change": "{{ messages.append(1) }}",
    "an attribute by a filter": "{{ ('' | attr('__class__')).__base__ }}",
    "a format": "{{ '{0.__class__.__mro__}'.format('') }}{{ ''.x.y }}",
    "no jinja": "{% for %}",
    "an exception": "{{ raise_exception('no') }}",
    "itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "an import": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_template_is_refused_before_it_is_used(name: str, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(GREEDY[name])
    with pytest.raises(ConfigError, match=r"but template\.jinja does not"):
        choose_format(tiny_tokenizer(), str(path))
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = GREEDY[name]
    with pytest.raises(ConfigError, match="the model's does not"):
        choose_format(tokenizer)


@pytest.mark.parametrize("name", FORBIDDEN)
def test_a_forbidden_template_is_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text(FORBIDDEN[name])
    prompts = choose_format(tiny_tokenizer(), str(path))
    for use in (
        lambda: prompts.encode(tiny_tokenizer(), ["Hi"], 32),
        lambda: prompts.render_answer(tiny_tokenizer(), "Hi", "Yes"),
        lambda: prompts.encode_conversation(tiny_tokenizer(), ["Hi"]),
    ):
        with pytest.raises(ConfigError, match="but it fails") as error:
            use()
        assert "\n" not in str(error.value)


def test_what_templates_do_is_let_through() -> None:
    real = (
        "{%- if not date is defined %}{%- set date = strftime_now('%d %b') %}{%- endif %}"
        "{%- for m in messages %}{%- if m.role == 'nobody' %}{%- continue %}{%- endif %}"
        "{{ '<|' ~ m.role ~ '|>' + m['content'] | trim }}{% generation %}{{ eos_token }}"
        "{% endgeneration %}{{ {'a': 'ä'} | tojson(indent=2) }}{%- endfor %}"
    )
    for template in (CHAT_TEMPLATE, real):
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = template
        assert "Hi" in choose_format(tokenizer).render(tokenizer, "Hi")


def test_several_templates_without_a_default_are_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"tools": CHAT_TEMPLATE}
    with pytest.raises(ConfigError, match="must be one text"):
        choose_format(tokenizer)
    tokenizer.chat_template = {"default": CHAT_TEMPLATE}
    assert choose_format(tokenizer) == PromptFormat(CHAT_TEMPLATE, "chat")
