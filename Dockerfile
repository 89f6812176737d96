# fraqtl-serve on NVIDIA GPUs: the official vLLM image and our plugin, nothing else changed.
#
#   docker build -t fraqtl-serve .
#   docker run --gpus all -p 8000:8000 --shm-size 1g -v fraqtl-cache:/cache fraqtl-serve MODEL [flags of fraqtl-serve serve]
#
# vLLM 0.33 instead of 0.32:   --build-arg BASE=vllm/vllm-openai:v0.33.0
#
# Takes nothing from the network but its base: it builds behind any proxy that has that.

ARG BASE=vllm/vllm-openai:v0.32.0

FROM ${BASE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY fraqtl_serve fraqtl_serve
COPY kernels kernels
COPY patches patches
COPY bench bench
RUN python3 -m pip wheel --no-deps --no-build-isolation --no-cache-dir --wheel-dir /wheels .

FROM ${BASE}
ARG BASE
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="fraqtl-serve" \
      org.opencontainers.image.description="vLLM with a KV cache of packed INT4 blocks" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="${BASE}"

# Without dependencies: the base has them, and its torch must stay. What we import beside vLLM is imported once to prove it.
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python3 -m pip freeze > /tmp/before \
 && PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --no-deps --no-index --no-cache-dir /wheels/*.whl \
 && python3 -m pip freeze --exclude fraqtl-serve > /tmp/after \
 && diff /tmp/before /tmp/after \
 && python3 -c "import httpx, pydantic, rich, fraqtl_serve.cli.main" \
 && rm /tmp/before /tmp/after

# Any user of group 0 may write what root's group may: platforms that pick a user by themselves do so (OpenShift).
RUN useradd --uid 10001 --gid 0 --home-dir /cache --no-create-home --shell /usr/sbin/nologin fraqtl \
 && install -d -o 10001 -g 0 -m 2775 /cache \
    /cache/huggingface /cache/fraqtl-serve /cache/vllm /cache/triton /cache/torchinductor /cache/flashinfer

# USER: a user that isn't in /etc/passwd has no name, and torch asks for one.
ENV HOME=/cache USER=fraqtl XDG_CACHE_HOME=/cache XDG_CONFIG_HOME=/cache/config \
    HF_HOME=/cache/huggingface VLLM_CACHE_ROOT=/cache/vllm \
    TRITON_CACHE_DIR=/cache/triton TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor FLASHINFER_WORKSPACE_BASE=/cache/flashinfer \
    VLLM_NO_USAGE_STATS=1 PYTHONUNBUFFERED=1 \
    HEALTH_URL=http://127.0.0.1:8000/health

WORKDIR /cache
USER 10001:0
VOLUME ["/cache"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# A first start downloads and compiles. No proxy: http_proxy must not catch a request to ourselves.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as u; u.build_opener(u.ProxyHandler({})).open(os.environ['HEALTH_URL'], timeout=4)"]
# Six seconds for running requests: `docker stop` kills after ten. A later --shutdown-timeout wins.
ENTRYPOINT ["fraqtl-serve", "serve", "--host", "0.0.0.0", "--shutdown-timeout", "6"]
