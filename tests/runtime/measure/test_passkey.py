"""The hidden key: what the text contains, and that the model finds the key within its trained context."""

import math
import pydoc_data.topics

import pytest
import ropewalk
from ropewalk import UserError
from ropewalk.container import native_schedule, read_header
from ropewalk.runtime.measure.passkey import OPENING, hide_key, read_key

TEXT = "\n\n".join(pydoc_data.topics.topics.values())


@pytest.fixture(scope="module")
def llm(smollm2):
    llm = ropewalk.Llama(
        smollm2, n_ctx=1024, verbose=False, n_threads=2, schedule=native_schedule(read_header(smollm2))
    )
    yield llm
    llm.close()


def test_the_key_is_in_the_middle_and_asked_for_at_the_end(llm):
    hidden = hide_key(llm, TEXT, 600, "48213")
    assert abs(len(hidden.text) - 600) < 60
    text = llm.detokenize(list(hidden.text), special=True).decode()
    assert text.count(f"{OPENING} 48213.") == 2
    assert 0.35 < text.index(OPENING) / len(text) < 0.65
    assert llm.detokenize(list(hidden.question)).decode().strip() == OPENING
    assert llm.detokenize(list(hidden.digits)).decode().strip() == "48213"
    with pytest.raises(UserError, match="tokens, expected at least"):
        hide_key(llm, "too short", 600, "48213")


def test_it_is_found_when_it_is_there_and_not_otherwise(llm):
    hidden = hide_key(llm, TEXT, 600, "48213")
    reading = read_key(llm, hidden, llm.schedule, start=100)
    assert reading.answer.startswith("48213")
    assert reading.key_loss < 0.5
    assert 1 < reading.perplexity < 100
    without = hide_key(llm, TEXT, 600, "48213")
    body = [*without.text[:200], *without.question, *without.digits]
    blind = llm.token_losses(body, start=len(body) - len(without.digits))
    assert float(blind.mean()) > reading.key_loss + 1
    assert math.isclose(reading.losses.shape[0], len(hidden.tokens) - 100)
