"""Conversations: the common form of all record formats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["chat", "completion", "text"]
Role = Literal["system", "developer", "user", "assistant", "tool"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Role of the speaker.
        content: The text; empty if the assistant only calls tools.
        counts: Whether the turn counts in the loss. Only used for assistant turns.
        reasoning: The assistant's reasoning before the answer, if the record keeps it in a field.
        tool_calls: The assistant's calls as Hugging Face's templates take them: objects of the form
            ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.
        name: Name of the tool in a tool's turn, else of the speaker; "" if unknown.
        tool_call_id: Id of the call that a tool's turn answers; "" if unknown.
    """

    role: Role
    content: str
    counts: bool = True
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    name: str = ""
    tool_call_id: str = ""

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates take it, without empty fields."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [dict(call) for call in self.tool_calls]
        if self.name:
            message["name"] = self.name
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


@dataclass(frozen=True)
class Conversation:
    """One training text before tokenisation.

    Attributes:
        messages: The turns. Raw text has none.
        where: Location of the record, for error messages.
        kind: ``chat``: needs a chat template. ``completion``: one user and one assistant turn, which can also be
            concatenated without a template. ``text``: `text` as it is.
        text: The raw text of kind ``text``.
        tools: Definitions of the tools that the assistant may call, as JSON schemas.
    """

    messages: tuple[Message, ...]
    where: str
    kind: Kind = "chat"
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def content_hash(self) -> str:
        """Return a digest of the content, regardless of location and outer whitespace.

        Returns:
            64 hexadecimal digits; equal for records that a split must keep together.
        """
        digest = hashlib.sha256()
        said: list[tuple[str, str]] = [(message.role, message.content) for message in self.messages]
        for message in self.messages:
            if message.reasoning or message.tool_calls:
                said.append(("reasoning", message.reasoning))
                said.append(("calls", json.dumps([dict(call) for call in message.tool_calls], sort_keys=True)))
        for role, content in (*said, ("text", self.text)):
            body = content.strip().encode("utf-8", "surrogatepass")
            digest.update(f"{role}\x1f{len(body)}\x1f".encode())
            digest.update(body)
        return digest.hexdigest()
