"""Chat templates are programs from a file: they are rendered within limits, and refused before a model is loaded."""

import os
import signal
import time
from datetime import date

import pytest
from ropewalk.errors import UserError
from ropewalk.runtime import Llama
from ropewalk.runtime.prompts import rendering
from ropewalk.runtime.prompts.rendering import TemplateError, render
from tiny_models import tiny_llama

HOSTILE = {
    "{% for m in messages %}{{ m.content }}": "line 1",
    "{{ messages | frobnicate }}": "frobnicate",
    "{{ 9**(9**9) }}": "CPU time",
    "{{ 'a' * 8000000000 }}": "memory",
    "{{ 'a' | center(8000000000) }}": "memory",
    "{{ '%8000000000d' % 1 }}": "memory",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "CPU time",
    "{% for i in range(99999) %}{% for j in range(99999) %}aaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}": "without end",
    "{% set s = namespace(t='aa') %}{% for i in range(60) %}{% set s.t = s.t + s.t %}{% endfor %}{{ s.t }}": "memory",
    "{% macro f(n) %}{{ f(n - 1) }}{{ f(n - 1) }}{% endmacro %}{% if 1 %}{{ f(500) }}{% endif %}": "",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}": "",
    "{{ " + "9" * 5000 + " }}": "",
    "{{ 1": "line 1",
    "{% include '/etc/passwd' %}": "",
    " " * (rendering.MAX_TEMPLATE + 1): "characters, expected at most",
}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rendering, "CPU_S", 1)
    rendering._renderer.end()
    yield
    rendering._renderer.end()


def load_with(path, template):
    tiny_llama(path, extend=lambda writer: writer.add_string("tokenizer.chat_template", template))
    return Llama(str(path), n_ctx=64, verbose=False)


@pytest.mark.parametrize("template", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_is_stopped(template):
    with pytest.raises(TemplateError) as refused:
        render(template, {"messages": [{"role": "user", "content": "Hello"}]})
    assert HOSTILE[template] in str(refused.value) and "\n" not in str(refused.value)
    assert len(str(refused.value)) < 400
    assert render("{{ messages[0].content }}", {"messages": [{"content": "still there"}]}) == "still there"


@pytest.mark.parametrize("name", ["", ".tool_use"])
def test_a_model_with_a_hopeless_template_is_refused_at_load(tmp_path, name):
    path = tiny_llama(
        tmp_path / "m.gguf", extend=lambda writer: writer.add_string(f"tokenizer.chat_template{name}", "{% for %}")
    )
    with pytest.raises(UserError, match=rf"m\.gguf: tokenizer\.chat_template{name}: the chat template cannot be used"):
        Llama(str(path), n_ctx=64, verbose=False)


def test_a_template_that_does_not_like_the_sample_is_kept(tmp_path):
    load_with(tmp_path / "m.gguf", "{{ raise_exception('only tools') }}").close()


def test_what_templates_use_works():
    template = (
        "{% generation %}{{ messages | tojson }}{% endgeneration %}{{ strftime_now('%Y') }}{{ bos_token }}"
        "{%- for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}{{ add_generation_prompt }}"
    )
    text = render(template, {"messages": [{"content": "Père \udcff"}], "bos_token": "<s>"}, date(2001, 2, 3))
    assert text == '[{"content": "Père \udcff"}]2001<s>01True'


def test_a_long_text_passes_and_ctrl_c_leaves_no_stale_reply(monkeypatch):
    long = "word " * 1_000_000
    assert render("{{ messages[0].content }}", {"messages": [{"content": long}]}) == long

    def interrupt(number, frame):
        raise KeyboardInterrupt

    monkeypatch.setattr(rendering, "CPU_S", 60)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}first", {})
    finally:
        signal.signal(signal.SIGALRM, before)
    assert render("second", {}) == "second"


def test_the_child_is_reused_and_replaced_after_its_death():
    render("a", {})
    child = rendering._renderer._child
    started = time.perf_counter()
    assert render("b", {}) == "b" and rendering._renderer._child is child
    assert time.perf_counter() - started < 0.5
    os.kill(child.pid, 9)
    child.wait()
    assert render("c", {}) == "c"


@pytest.mark.parametrize(("program", "reason"), [("/nosuch", "No such file"), ("/bin/false", "it ended with code 1")])
def test_a_renderer_that_cannot_start_is_one_line(monkeypatch, program, reason):
    monkeypatch.setattr("sys.executable", program)
    with pytest.raises(UserError, match=f"{program}: cannot start the process that renders chat templates: {reason}"):
        render("a", {})
