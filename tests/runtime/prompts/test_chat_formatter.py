"""llama_cpp's chat completions with the model's own template: the same prompts, within limits."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from ropewalk import Llama, UserError
from ropewalk.runtime.prompts.chat_formatter import GuardedFormatter

TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}{% endfor %}",
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}{{ messages[0].content }}{% endif %}",
    "{% if enable_thinking is defined and not enable_thinking %}no thoughts{% endif %}{{ strftime_now('%Y-%m-%d') }}",
    "{% generation %}{{ messages | length }}{% endgeneration %}{{ function_call }}{{ tool_choice }}",
    "{% for m in messages %}{% if m.content is not string %}{% for p in m.content %}{{ p.text }}{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}",
)
MESSAGES: list[Any] = [
    {"role": "user", "content": "what é"},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("more", [{}, {"tools": TOOLS, "enable_thinking": False, "tool_choice": "auto"}], ids=str)
def test_a_prompt_is_as_in_llama_cpp(template: str, more: dict[str, Any]) -> None:
    messages = MESSAGES if "not string" in template else MESSAGES[:1]
    stock = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>", stop_token_ids=[2])
    expected = stock(messages=messages, **more)
    found = GuardedFormatter(template, (2, "</s>"), "<s>")(messages=messages, **more)
    assert (found.prompt, found.stop, found.added_special) == (expected.prompt, expected.stop, expected.added_special)
    for token in (1, 2):
        assert found.stopping_criteria([5, token], None) == expected.stopping_criteria([5, token], None)


def test_the_time_of_day_is_known() -> None:
    formatter = GuardedFormatter("{{ strftime_now('%Y-%m-%d %H') }}", (2, ""), "")
    before, found = datetime.now(), formatter(messages=MESSAGES).prompt
    assert found in {f"{moment:%Y-%m-%d %H}" for moment in (before, datetime.now())}


def test_a_template_is_stopped_that_turns_hostile_later(tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """It does no harm with the sample that is rendered when the model is loaded."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = f"{{% if messages | length > 1 %}}{endless}{{% endif %}}{{{{ messages[0].content }}}}"

    def extend(writer: Any) -> None:
        writer.add_chat_template([{"name": "default", "template": template}, {"name": "other", "template": template}])

    path = tiny_llama(tmp_path / "m.gguf", extend=extend)
    for chat_format in (None, "chat_template.other"):
        llm = Llama(path, n_ctx=64, chat_format=chat_format, verbose=False)
        assert llm.create_chat_completion([{"role": "user", "content": "the tea"}], max_tokens=2)["choices"]
        with pytest.raises(UserError, match="it does not end within 2 s of CPU time"):
            llm.create_chat_completion([{"role": "user", "content": "the tea"}] * 2)


def test_what_a_template_refuses_is_a_value_error_as_in_llama_cpp() -> None:
    formatter = GuardedFormatter("{{ raise_exception('roles must alternate') }}", (2, ""), "")
    with pytest.raises(ValueError, match="roles must alternate"):
        formatter(messages=MESSAGES)


def test_variables_that_json_does_not_have() -> None:
    with pytest.raises(UserError, match="templates take what JSON can hold"):
        GuardedFormatter("x", (2, ""), "")(messages=MESSAGES, tools=[object()])
