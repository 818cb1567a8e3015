"""The agent behind the proxy: an AgentFlow graph that `agentflow api` serves.

It never meets a client directly: only the proxy holds the secret that its requests are signed with.
"""
