"""Text in, text out: chat template, answer, conversation, summary, and the results of a batch."""

from .answer import Answer, ContextFull, Sampling, piece
from .conversation import Conversation, Transcript, saved_model
from .results import Results, StandardOutput, settings_digest
from .summary import PROMPT, EmptySummary, Summarizer, Summary, SummarySettings
from .template import ChatTemplate, Message, count_tokens

__all__ = [
    "PROMPT",
    "Answer",
    "ChatTemplate",
    "ContextFull",
    "Conversation",
    "EmptySummary",
    "Message",
    "Results",
    "Sampling",
    "StandardOutput",
    "Summarizer",
    "Summary",
    "SummarySettings",
    "Transcript",
    "count_tokens",
    "piece",
    "saved_model",
    "settings_digest",
]
