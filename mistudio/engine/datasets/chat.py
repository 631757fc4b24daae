"""Conversations in rows: `messages` (role, content) and ShareGPT's `conversations` (from, value).

What stands here is plain data; a model's own template is applied when the text is tokenised.
"""

from __future__ import annotations

from typing import Any

# Columns that usually hold a conversation, best first.
CHAT_COLUMNS = ("messages", "conversations", "conversation", "chat", "dialogue", "dialog")
# What data sets call the two sides -> the names that chat templates know.
ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "function": "tool",
    "observation": "tool",
}

Messages = tuple[tuple[str, str], ...]


def messages_of(value: object) -> Messages | None:
    """The messages that a cell holds; None where it holds no conversation."""
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if not isinstance(value, list) or not value:
        return None
    messages = [_message(entry) for entry in value]
    return None if None in messages else tuple(m for m in messages if m is not None)


def plain_reading(messages: Messages) -> str:
    """A conversation as text: `User: …`, a blank line, `Assistant: …`; turns without words (such
    as calls of tools) are left out."""
    said = [(role, content) for role, content in messages if content.strip()]
    return "\n\n".join(f"{role[:1].upper()}{role[1:]}: {content}" for role, content in said)


def _message(entry: object) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        return None
    for role_key, content_key in (("role", "content"), ("from", "value")):
        role = entry.get(role_key)
        if isinstance(role, str) and content_key in entry:
            content = _content(entry[content_key])
            return None if content is None else (ROLES.get(role.lower(), role.lower()), content)
    return None


def _content(value: object) -> str | None:
    """A string, or the text of a list of parts (pictures and the like have none)."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, dict | str) for part in value):
        return "\n".join(text for part in value if (text := _part(part)))
    return None


def _part(part: Any) -> str:
    text = part if isinstance(part, str) else part.get("text")
    return text if isinstance(text, str) else ""
