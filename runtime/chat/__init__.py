"""Text in, text out: chat template, answer, conversation, summary, and the results of a batch."""

from .answer import Answer, ContextFull, Sampling, piece
from .conversation import Conversation, Transcript
from .results import Results, StandardOutput, settings_digest
from .summary import PROMPT, EmptySummary, NothingToSummarize, Summarizer, Summary, SummarySettings, has_words
from .template import ChatTemplate, Message, count_tokens

__all__ = [
    "PROMPT",
    "Answer",
    "ChatTemplate",
    "ContextFull",
    "Conversation",
    "EmptySummary",
    "Message",
    "NothingToSummarize",
    "Results",
    "Sampling",
    "StandardOutput",
    "Summarizer",
    "Summary",
    "SummarySettings",
    "Transcript",
    "count_tokens",
    "has_words",
    "piece",
    "settings_digest",
]
