"""The models an agent can think with: a deterministic local one, or a provider's through AgentFlow's `Agent`.

The local one never touches the network; neither swallows a cancellation, so a closed stream stops the model.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from agentflow.core.graph import Agent, BaseAgent
from agentflow.core.state import AgentState, Message, TextBlock, ToolCallBlock
from agentflow.core.state.message import TokenUsages, generate_id
from agentflow.runtime.adapters.llm.base_converter import BaseConverter
from agentflow.runtime.adapters.llm.model_response_converter import ModelResponseConverter

from agent_service.script import Script, ToolCall, deltas, parse_script
from agent_service.settings import LOCAL, Settings

TOOL_NODE = "TOOL"


class ScriptedError(Exception):
    """The failure a prompt asked for."""


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer of the local model, not yet spoken."""

    script: Script
    said: Sequence[str]
    result: str | None
    prompt_words: int

    def tool_call(self) -> ToolCall | None:
        """Return the call to make before anything can be said, if the script asks for one."""
        answer = self.script.answer
        return answer if isinstance(answer, ToolCall) and self.result is None else None

    async def speak(self) -> AsyncIterator[str]:
        """Yield the deltas at the script's pace. Raises ScriptedError where the script says so."""
        script = self.script
        pieces = () if self.tool_call() else deltas(script.answer, said=self.said, result=self.result or "")
        await asyncio.sleep(script.wait)
        for spoken, piece in enumerate(pieces):
            if script.failure and spoken == script.failure.after:
                break
            # Even a pause of zero lets the loop see that the client has left.
            await asyncio.sleep(script.pace if spoken else 0)
            yield piece
        if script.failure and not self.tool_call():
            raise ScriptedError(script.failure.message)


class ReplyConverter(BaseConverter):
    """Turns a reply into AgentFlow's messages: deltas first, then the whole with its usage."""

    async def convert_response(self, response: Reply) -> Message:
        """Return the whole reply as one message."""
        return _whole(response, "".join([piece async for piece in response.speak()]), generate_id(None))

    async def convert_streaming_response(  # type: ignore[override]  # the base declares a coroutine, its callers iterate
        self,
        config: dict[str, Any],  # noqa: ARG002  # the framework's signature
        node_name: str,  # noqa: ARG002  # as above
        response: Reply,
        meta: dict[str, Any] | None = None,  # noqa: ARG002  # as above
    ) -> AsyncGenerator[Message]:
        """Yield each delta as it is spoken, then the whole under the same id."""
        message_id = generate_id(None)
        pieces = []
        async for piece in response.speak():
            pieces.append(piece)
            yield Message(message_id=message_id, role="assistant", content=[TextBlock(text=piece)], delta=True)
        yield _whole(response, "".join(pieces), message_id)


class LocalModel(BaseAgent):
    """A model without a provider: does what the directives in the user's text say, or echoes the text."""

    def __init__(self) -> None:
        super().__init__(model=LOCAL)

    async def execute(self, state: AgentState, config: dict[str, Any]) -> ModelResponseConverter:  # noqa: ARG002  # the framework's signature
        """Return a reply to the state's messages, to be streamed or invoked by the framework."""
        return ModelResponseConverter(_reply(state.context), converter=ReplyConverter())

    async def _call_llm(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        **kwargs: Any,  # noqa: ANN401  # the framework's signature
    ) -> NoReturn:
        message = "The local model has no provider to call."
        raise NotImplementedError(message)


def choose_model(settings: Settings) -> BaseAgent:
    """Return the model the settings name; a provider's answers at OPENAI_BASE_URL when that is set."""
    if settings.model == LOCAL:
        return LocalModel()
    # Without `reasoning_config=None` AgentFlow asks every model for reasoning, which most refuse.
    return Agent(settings.model, tool_node=TOOL_NODE, base_url=settings.base_url, reasoning_config=None)


def _reply(context: Sequence[Message]) -> Reply:
    said = [message.text() for message in context if message.role == "user"]
    last = context[-1] if context else None
    return Reply(
        script=parse_script(said[-1] if said else ""),
        said=said[:-1],
        result=last.text() if last is not None and last.role == "tool" else None,
        prompt_words=sum(len(message.text().split()) for message in context),
    )


def _whole(reply: Reply, text: str, message_id: str | int) -> Message:
    call = reply.tool_call()
    if call is None:
        return Message(
            message_id=message_id,
            role="assistant",
            content=[TextBlock(text=text)],
            usages=_usages(reply, completion=len(text.split())),
        )
    call_id = f"call_{message_id}"
    arguments = dict(call.arguments)
    function = {"name": call.name, "arguments": json.dumps(arguments)}
    return Message(
        message_id=message_id,
        role="assistant",
        content=[ToolCallBlock(id=call_id, name=call.name, args=arguments)],
        tools_calls=[{"id": call_id, "type": "function", "function": function}],
        usages=_usages(reply, completion=1 + len(arguments)),
    )


def _usages(reply: Reply, *, completion: int) -> TokenUsages:
    """Words stand for tokens, so that the same conversation always costs the same."""
    return TokenUsages(
        prompt_tokens=reply.prompt_words,
        completion_tokens=completion,
        total_tokens=reply.prompt_words + completion,
    )
