"""Text in, text out: chat template, answer, conversation, summary, and the results of a batch."""

from .answer import Answer, ContextFull, Sampling, piece
from .conversation import Conversation, Saved, Transcript, drop_saved_cache, read_saved
from .results import Results, StandardOutput, settings_digest
from .summary import PROMPT, EmptySummary, NothingToSummarize, Summarizer, Summary, SummarySettings, has_words
from .template import ChatTemplate, Message, count_tokens, most_tokens

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
    "Saved",
    "StandardOutput",
    "Summarizer",
    "Summary",
    "SummarySettings",
    "Transcript",
    "count_tokens",
    "drop_saved_cache",
    "has_words",
    "most_tokens",
    "piece",
    "read_saved",
    "settings_digest",
]
