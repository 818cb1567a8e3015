"""The agent as a graph: the assistant speaks, calls a tool when it wants one, and speaks again.

It never knows which model or which store it runs on; `app` is the one place that chooses them.
"""

import os
import sys

from agentflow.core import CompiledGraph
from agentflow.core.graph import BaseAgent, StateGraph, ToolNode
from agentflow.core.state import AgentState
from agentflow.storage.checkpointer import BaseCheckpointer
from agentflow.utils import END

from agent_service.checkpoints import open_checkpointer
from agent_service.models import TOOL_NODE, choose_model
from agent_service.settings import SettingsError, read_settings
from agent_service.tools import TOOLS

ASSISTANT_NODE = "MAIN"


def app() -> CompiledGraph[AgentState]:
    """Make the graph that `agentflow api` serves; it calls this once, when it starts.

    Raises SystemExit with a sentence for everything that is wrong with the environment.
    """
    try:
        settings = read_settings(os.environ)
        return build(choose_model(settings), open_checkpointer(settings.storage))
    except SettingsError as error:
        # The server prints what stops its start as a traceback, and sixty frames would bury the sentences.
        sys.tracebacklimit = 0
        raise SystemExit(str(error)) from None


def build(model: BaseAgent, checkpointer: BaseCheckpointer[AgentState]) -> CompiledGraph[AgentState]:
    """Build the graph of a model, with threads kept in `checkpointer`."""
    graph = StateGraph[AgentState](AgentState())
    graph.add_node(ASSISTANT_NODE, model)
    graph.add_node(TOOL_NODE, ToolNode(list(TOOLS)))
    graph.set_entry_point(ASSISTANT_NODE)
    graph.add_conditional_edges(ASSISTANT_NODE, after_assistant, {TOOL_NODE: TOOL_NODE, END: END})
    graph.add_edge(TOOL_NODE, ASSISTANT_NODE)
    return graph.compile(checkpointer=checkpointer)


def after_assistant(state: AgentState) -> str:
    """Say where the graph goes once the assistant has spoken."""
    last = state.context[-1] if state.context else None
    wants_tool = last is not None and last.role == "assistant" and bool(last.tools_calls)
    return TOOL_NODE if wants_tool else END
