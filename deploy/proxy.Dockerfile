# Built from the repository's root: docker build -f deploy/proxy.Dockerfile .
# One that is pinned to a digest makes the same image of the same files each time.
ARG PYTHON_IMAGE=python:3.13-slim
FROM ${PYTHON_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
# Docker's official Python is built with profiles (PGO); one that is not takes a fifth more for each request.
RUN ["python", "-c", "import sysconfig; assert '--enable-optimizations' in sysconfig.get_config_var('CONFIG_ARGS')"]
RUN ["python", "-m", "venv", "--without-pip", "/opt/venv"]
COPY requirements/proxy.txt requirements/build.txt requirements/
# --only-binary: nothing that is downloaded gets to run its own set-up code.
RUN ["pip", "--python", "/opt/venv/bin/python", "install", "--no-compile", "--require-hashes", "--only-binary", ":all:", "-r", "requirements/proxy.txt"]
RUN ["pip", "install", "--require-hashes", "--only-binary", ":all:", "-r", "requirements/build.txt"]
COPY pyproject.toml README.md LICENSE ./
COPY proxy proxy
RUN ["pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "/wheels", "."]
# Its version is the one that was just built.
# hadolint ignore=DL3013
RUN ["pip", "--python", "/opt/venv/bin/python", "install", "--no-compile", "--no-deps", "--no-index", "--find-links", "/wheels", "agentflow-proxy"]
# No times within, so that two builds are alike; and no import asks whether its source, which nobody can change, is newer.
RUN ["python", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "/opt/venv/lib"]

FROM ${PYTHON_IMAGE}
ENV PATH=/opt/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1 HOME=/tmp
# An empty volume takes its owner from here.
RUN ["install", "-d", "-m", "0700", "-o", "10001", "-g", "10001", "/data"]
COPY --from=build /opt/venv /opt/venv
WORKDIR /tmp
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=20s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=3)"]
CMD ["agentflow-proxy", "serve"]
