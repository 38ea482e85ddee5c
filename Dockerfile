# requant in a container, for a CPU (the last stage, built by default) or for NVIDIA GPUs:
#
#     docker build -t requant .
#     docker build -t requant:cuda --target cuda .
#     docker run --rm -v "$PWD:/work" requant run recipe.yaml
#     docker run --rm -v "$PWD:/work" --gpus all requant:cuda run recipe.yaml
#
# /work is the current directory; --user "$(id -u):$(id -g)" writes files as you. Versions are those of constraints.txt.
# torch is the build that pip takes by default; TORCH_OPTIONS names another index, for one without CUDA.

ARG PYTHON=3.11.14-slim-bookworm

FROM python:${PYTHON} AS build
ARG TORCH_OPTIONS=""
ENV PATH=/opt/requant/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /src
RUN python -m venv /opt/requant
COPY constraints.txt ./
RUN python -m pip install --quiet -c constraints.txt ${TORCH_OPTIONS} torch
RUN python -m pip install --quiet -c constraints.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY pipeline ./pipeline
COPY eval ./eval
RUN python -m pip install --quiet -c constraints.txt --no-build-isolation ".[gguf]"
RUN python -m pip check && requant --version

FROM python:${PYTHON} AS base
RUN useradd --create-home --uid 1000 requant && install --directory --owner=requant /work
COPY --from=build /opt/requant /opt/requant
ENV PATH=/opt/requant/bin:$PATH TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
WORKDIR /work
ENTRYPOINT ["requant"]
CMD ["--help"]

# Triton compiles with the system's C compiler; CUDA's libraries come with torch.
FROM base AS cuda
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER requant

FROM base AS cpu
USER requant
