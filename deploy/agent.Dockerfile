# Built from the repository's root: docker build -f deploy/agent.Dockerfile .
# One that is pinned to a digest makes the same image of the same files each time.
ARG PYTHON_IMAGE=python:3.13-slim
FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Docker's official Python is built with profiles (PGO); one that is not takes a fifth more for each request.
RUN ["python", "-c", "import sysconfig; assert '--enable-optimizations' in sysconfig.get_config_var('CONFIG_ARGS')"]
RUN ["python", "-m", "venv", "--without-pip", "/opt/venv"]
COPY requirements/agent.txt requirements/build.txt requirements/
# --only-binary: nothing that is downloaded gets to run its own set-up code.
RUN ["pip", "--python", "/opt/venv/bin/python", "install", "--no-compile", "--require-hashes", "--only-binary", ":all:", "-r", "requirements/agent.txt"]
RUN ["pip", "install", "--require-hashes", "--only-binary", ":all:", "-r", "requirements/build.txt"]
COPY pyproject.toml README.md LICENSE ./
COPY agent_service agent_service
RUN ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "/wheels", "."]
# Its version is the one that was just built.
# hadolint ignore=DL3013
RUN ["pip", "--python", "/opt/venv/bin/python", "install", "--no-compile", "--no-deps", "--no-index", "--find-links", "/wheels", "agentflow-proxy"]
# No times within, so that two builds are alike; and no import asks whether its source, which nobody can change, is newer.
RUN ["python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/opt/venv/lib"]

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HOME=/tmp
# An empty volume takes its owner from here.
RUN ["install", "-d", "-m", "0700", "-o", "10002", "-g", "10002", "/data"]
COPY --from=build /opt/venv /opt/venv
COPY agent_service/agentflow.json /etc/agentflow/agentflow.json
COPY --chmod=0755 deploy/agent-entrypoint.sh /usr/local/bin/agent-entrypoint
WORKDIR /tmp
USER 10002:10002
EXPOSE 8001
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8001/ping', timeout=3)"]
ENTRYPOINT ["agent-entrypoint"]
# `agentflow api` says of itself that it is for development, and resets requests when it is asked to stop.
CMD ["python", "-m", "agent_service.serve", "--host", "0.0.0.0", "--port", "8001", "--config", "/etc/agentflow/agentflow.json"]
