# The program, its demo and its server. For a CPU:
#   docker build -t cores .
# for NVIDIA GPUs (torch as PyPI has it):
#   docker build -t cores-cuda --build-arg TORCH_INDEX=https://pypi.org/simple .
#
#   docker run --rm -v cores-runs:/cores/runs -v cores-data:/cores/data cores make demo
#   docker run --rm -p 127.0.0.1:8000:8000 -v cores-runs:/cores/runs cores \
#       cores serve --version runs/demo/model --host 0.0.0.0 --no_auth
FROM python:3.11-slim-bookworm

# DeepSpeed asks for a compiler when it is imported.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

# The same script as on any machine makes the environment, where `make` finds it again. A build for CPUs has the
# version "…+cpu", which pip prefers to the one without a suffix.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV CORES_CACHE=/opt/cores \
    PATH=/cores/.venv/bin:$PATH
WORKDIR /cores
COPY requirements.txt requirements-optional.txt ./
COPY scripts/setup.sh scripts/
RUN PIP_EXTRA_INDEX_URL=$TORCH_INDEX PIP_NO_CACHE_DIR=1 scripts/setup.sh

COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable . \
    && useradd --create-home --uid 1000 cores \
    && mkdir -p runs data \
    && chown cores . runs data
USER 1000
EXPOSE 8000
CMD ["cores", "--help"]
