"""Random chat templates, from the pieces of real and of hostile ones: each gives a text or one line, soon."""

import time

from fuzzing import check_line, rounds
from ropewalk.runtime.prompts import rendering
from ropewalk.runtime.prompts.rendering import TemplateError, render

EXPRESSIONS = (
    "m.content",
    "m['role']",
    "messages",
    "messages[0]",
    "messages[-1].content",
    "loop.index",
    "bos_token",
    "undefined",
    "m.__class__.__mro__",
    "''.__class__",
    "messages.append(1)",
    "cycler.__init__.__globals__",
    "range(99999)",
    "lipsum",
    "9",
    "9**9",
    "9**(9**9)",
    "-1",
    "1e308*10",
    "'a'",
    "'a'*99999999",
    "'<|im_end|>'",
    "{}",
    "[[]]*999",
    "strftime_now('%Y')",
    "raise_exception('no')",
    "raise_exception(messages)",
    "namespace(a=1)",
    "joiner()",
    "dict(a=1)",
    "none",
    "true",
)
FILTERS = (
    "trim",
    "upper",
    "tojson",
    "tojson(indent=99999999)",
    "length",
    "list",
    "join",
    "center(99999999)",
    "first",
    "safe",
    "replace('a', 'aaaaaaaaaa')",
    "default('x')",
    "map(attribute='content')",
    "batch(2)",
    "format(1)",
    "nosuch",
    "string",
    "indent(9999)",
    "random",
    "sum",
    "sort",
    "wordwrap(1)",
    "reverse",
    "int",
    "urlize",
    "xmlattr",
    "pprint",
)
OPENINGS = (
    "{% for m in messages %}",
    "{% for m in E %}",
    "{% if E %}",
    "{% if E is string %}",
    "{% macro f(n) %}",
    "{% set x %}",
    "{% filter upper %}",
    "{% call f(1) %}",
    "{% generation %}",
    "{% raw %}",
    "{% block b %}",
    "{% with a = E %}",
)
SINGLE = (
    "{{ E }}",
    "{{- E -}}",
    "{% set x = E %}",
    "{% set ns.a = E %}",
    "{% break %}",
    "{% else %}",
    "{{ f(E) }}",
    "{% nosuch %}",
    "{{ E + E }}",
    "{{ E ~ E }}",
    "{{ E if E else E }}",
    "{# x #}",
    "{#",
    "{{",
    "%}",
    "{% include E %}",
    "{% extends E %}",
    "<|im_start|>",
    "\n",
    "\0",
    "\ud800",
    "é",
    "{% import 'x' as y %}",
    "{{ E[E] }}",
    "{% do E %}",
)


def expression(rng):
    text = rng.choice(EXPRESSIONS)
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2, 40))):
        text = f"{text} | {rng.choice(FILTERS)}" if rng.random() < 0.7 else f"({text} + {rng.choice(EXPRESSIONS)})"
    return text


def template(rng):
    pieces, ends = [], []
    for _ in range(rng.choice((1, 3, 8, 30))):
        kind = rng.random()
        if kind < 0.3:
            pieces.append(rng.choice(OPENINGS))
            ends.append(f"{{% end{pieces[-1].split()[1]} %}}")
        elif kind < 0.5 and ends:
            pieces.append(ends.pop())
        else:
            pieces.append(rng.choice(SINGLE))
    text = "".join(pieces + (ends[::-1] if rng.random() < 0.8 else []))
    while "E" in text:
        text = text.replace("E", expression(rng), 1) if rng.random() < 0.95 else text.replace("E", "1")
    return text


def test_random_templates_end_soon_in_a_text_or_in_one_line(monkeypatch):
    monkeypatch.setattr(rendering, "CPU_S", 1)
    rendering._renderer.end()
    texts = refused = 0
    for rng in rounds(4):
        source = template(rng)
        started = time.process_time()
        try:
            text = render(source, {"messages": [{"role": "user", "content": "Hello"}]})
        except TemplateError as error:
            refused += 1
            check_line(error)
        else:
            texts += 1
            assert isinstance(text, str), source
        assert time.process_time() - started < 1, source  # of this process
    assert texts and refused
    rendering._renderer.end()
