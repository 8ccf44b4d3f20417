"""Suites of questions about long texts whose answers are known: RULER's tasks, and two more kinds."""
