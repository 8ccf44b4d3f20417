"""From messages to prompts, safely: chat templates rendered with limits, and control tokens kept out of users' text."""
