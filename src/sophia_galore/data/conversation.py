"""What all record formats are turned into."""

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
        role: Who speaks.
        content: What is said; empty where the assistant only calls tools.
        counts: Whether the loss counts what is said here. Of no effect but in an assistant's turn.
        reasoning: What an assistant thought before it answered, where the record keeps that apart.
        tool_calls: An assistant's calls as Hugging Face's templates take them: objects of the form
            ``{"type": "function", "function": {"name": ..., "arguments": {...}}}``.
        name: Which tool answers, in a tool's turn, or who speaks, in another one; "" if that is not said.
        tool_call_id: Which call a tool's turn answers; "" if that is not said.
    """

    role: Role
    content: str
    counts: bool = True
    reasoning: str = ""
    tool_calls: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    name: str = ""
    tool_call_id: str = ""

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates take it; a field that says nothing is left out."""
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
    """One training text before it meets a tokenizer.

    Attributes:
        messages: The turns. Raw text has none.
        where: The record's place, for messages.
        kind: ``chat``: needs a chat template. ``completion``: one user and one assistant turn
            which may also be written one after the other. ``text``: `text` as it is.
        text: The raw text of kind ``text``.
        tools: Definitions of the tools that the assistant may call, as JSON schemas.
    """

    messages: tuple[Message, ...]
    where: str
    kind: Kind = "chat"
    text: str = ""
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def content_hash(self) -> str:
        """A digest of what is said, regardless of where it stands and of outer whitespace.

        Returns:
            64 hexadecimal digits; equal for records that a split must not separate.
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
