"""Text in, text out: chat template, answer, conversation, summary, and the results of a batch."""
