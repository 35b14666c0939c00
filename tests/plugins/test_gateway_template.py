"""Chat templates are programs of strangers: what they may do, and that they end.

Each bomb is a template that an unbounded renderer would choke on: gigabytes of memory, or minutes
inside one operation that no deadline can interrupt.
"""

from __future__ import annotations

import threading
import tracemalloc
from collections.abc import Mapping

import pytest

from swarmpy.errors import ModelRefused
from swarmpy.plugins.gateway import sandbox
from swarmpy.plugins.gateway.errors import RequestRefused
from swarmpy.plugins.gateway.template import TEMPLATE_CHARS_MAX, ChatTemplate, Deadline

MESSAGES = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yo"}]


def render(source: str, variables: Mapping[str, object] | None = None) -> str:
    template = ChatTemplate(source, strftime=lambda pattern: f"<{pattern}>")
    return template.render({"messages": MESSAGES, **(variables or {})})


def grown_by(step: str, first: str = "'aaaaaaaaaa'") -> str:
    """A template that grows `ns.x` by a step sixty times."""
    begin = "{% set ns = namespace(x=" + first + ") %}{% for i in range(60) %}"
    return begin + step + "{% endfor %}{{ ns.x }}"


# What templates use ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.role }}:{{ m['content'] | trim }};{% endfor %}",
         "user:Hi;assistant:Yo;"),
        ("{{ messages[0].content.strip() + '!' }}", "Hi!"),
        ("{{ messages[-1]['content'] ~ 1 ~ none ~ true }}", "Yo1NoneTrue"),
        ("{{ messages[1:] | length }}", "1"),
        ("{% for m in messages %}{% if loop.last %}{{ loop.index0 }}{% endif %}{% endfor %}", "1"),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
         "{{ ns.n }}", "2"),
        ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(messages[0].role) }}", "<user>"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user, assistant"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{{ {'b': 'é<', 'a': [1, none]} | tojson }}", '{"b": "é<", "a": [1, null]}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ 'a-b'.split('-') | last }}{{ 'x'.replace('x', 'y') }}{{ ','.join(['1', '2']) }}",
         "by1,2"),
        ("{{ 'a\nb' | indent(2) }}", "a\n  b"),
        ("{{ '%s has %d' % ('x', 3) }}", "x has 3"),
        ("{{ 7 % 2 }}{{ 2 ** 5 }}{{ 3 * 'ab' }}{{ [0] * 2 }}", "132ababab[0, 0]"),
        ("{{ undefined_thing is defined }}{{ missing or 'd' }}{{ x | default('e') }}", "Falsede"),
        ("{{ strftime_now('%d %b %Y') }}", "<%d %b %Y>"),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("{% for m in messages %}{% break %}{% endfor %}end", "end"),
        ("{{ '3' | int + 1 }}{{ [1, 2] | sum }}{{ 1.26 | round(1) }}", "431.3"),
        ("{%- if true -%}\n  x\n{%- endif %}\n", "x"),
        ("{{ messages[0] }}", "{'role': 'user', 'content': ' Hi '}"),
    ],
)  # fmt: skip
def test_what_templates_use_works(source: str, text: str) -> None:
    assert render(source) == text


def test_a_template_may_refuse_the_messages() -> None:
    with pytest.raises(RequestRefused, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert (caught.value.refusal.status, caught.value.refusal.param) == (400, "messages")


# What they may not ------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ range.__class__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({}) }}",
        "{{ (1).to_bytes(9999999999, 'big') }}",
        "{{ 'x'.encode() }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ '{a.__class__}'.format_map({'a': 1}) }}",
        "{{ lipsum(1) }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{{ namespace }}",
        "{{ messages | map('attr', '__class__') | list }}",
    ],
)
def test_a_template_reaches_nothing_but_the_messages(source: str) -> None:
    try:
        shown = render(source)
    except (RequestRefused, ModelRefused):
        return
    assert shown == ""


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**10 }}",
        "{{ 10**10 * 'a' }}",
        "{{ 9**(9**9) }}",
        "{{ (10**70 * 10**70) * (10**70 * 10**70) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%*d' % (999999999, 1) }}",
        "{{ '%.999999999f' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ 'a'.center(999999999) }}",
        "{{ 'a'.zfill(999999999) }}",
        "{{ 'a'|center(999999999) }}",
        "{{ '\\t'.expandtabs(999999999) }}",
        "{{ 1.5|round(999999999, 'ceil') }}",
        "{{ range(999999999)|list }}",
        "{{ strftime_now('%999999999d') }}",
        "{{ ([[1] * 100000] * 100)|sum(start=[]) }}",
        "{{ ('%s' * 2000000) % messages }}",
        "{{ '%s%s%s' % ('a' * 3000000, 'b', 'c') }}",
        grown_by("{% set ns.x = ns.x ~ ns.x %}"),
        grown_by("{% set ns.x = ns.x + ns.x %}"),
        grown_by("{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}"),
        grown_by("{% set ns.x = ns.x.replace('a', 'aa') %}"),
        grown_by("{% set ns.x = ns.x|replace('a', 'aa') %}"),
        grown_by("{% set ns.x = [ns.x, ns.x]|join %}"),
        grown_by("{% set ns.x = ns.x.join(['a', 'a', 'a']) %}"),
        grown_by("{% set ns.x = [ns.x, ns.x] %}"),
        grown_by("{% set ns.x = (ns.x, ns.x) %}"),
        grown_by("{% set ns.x = {'a': ns.x, 'b': ns.x} %}"),
        grown_by("{% set ns.x = dict(a=ns.x, b=ns.x) %}"),
        grown_by("{% set ns.x = (ns.x|tojson)|tojson %}", "'\"'"),
        "{% set ns = namespace(a=1, b=1) %}{% macro ma() %}{% set ns.a = varargs %}{% endmacro %}"
        "{% macro mb() %}{% set ns.b = varargs %}{% endmacro %}{% for i in range(20) %}"
        "{{ ma(ns.a, ns.a) }}{{ mb(ns.b, ns.b) }}{% endfor %}{{ ns.a == ns.b }}",
        "{% set ns = namespace(x='a' * 1000000, l=[]) %}"
        "{% for i in range(10000) %}{% set ns.l = ns.l + [ns.x[i:]] %}{% endfor %}",
        "{% set ns = namespace(x='a' * 1000000) %}"
        "{% for i in range(10000) %}{% set _ = ns.x.upper() %}{% endfor %}",
        "{% for i in range(10000) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% macro m(n) %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
        "{" + "% if" * 100_000,
    ],
)  # fmt: skip
def test_a_bomb_is_refused_before_it_takes_memory(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "VALUE_SIZE_MAX", 1 << 16)
    monkeypatch.setattr(sandbox, "SIZE_IN_ALL_MAX", 1 << 20)
    tracemalloc.start()
    try:
        with pytest.raises((RequestRefused, ModelRefused)):
            render(source)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{{ m(60) }}",
        "{% for a in range(9999) %}{{ range(9999)|map('string')|list|length }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_is_ended_by_its_deadline(source: str) -> None:
    deadline = Deadline()
    timer = threading.Timer(0.2, lambda: setattr(deadline, "has_passed", True))
    timer.start()
    template = ChatTemplate(source, strftime=str)

    with pytest.raises(ModelRefused, match="seconds"):
        template.render({}, deadline)
    timer.join()


def test_a_text_of_the_users_may_be_as_large_as_a_body() -> None:
    text = "x" * 2_000_000
    assert len(
        render("{{ messages[0].content | trim }}", {"messages": [{"content": text}]})
    ) == len(text)


def test_too_long_a_template_is_refused() -> None:
    with pytest.raises(ModelRefused, match="exceeds"):
        render(" " * (TEMPLATE_CHARS_MAX + 1))


@pytest.mark.parametrize("source", ["{% if %}", "{{ 1 | nothing }}", "{% endfor %}", "{{ 'x"])
def test_a_template_that_is_none_is_refused(source: str) -> None:
    with pytest.raises(ModelRefused, match="chat template"):
        render(source)


@pytest.mark.parametrize("source", ["{{ 1 / 0 }}", "{{ a.b.c }}", "{{ 'x' + 1 }}"])
def test_a_template_that_fails_is_a_400(source: str) -> None:
    with pytest.raises(RequestRefused) as caught:
        render(source)
    assert caught.value.refusal.code == "template_failed"
