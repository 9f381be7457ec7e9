# meswitch in vLLM, on an NVIDIA GPU. vLLM's own image has CUDA, torch and a compiler for kernels.
#
#     docker build -f containers/vllm.Dockerfile -t meswitch:vllm .
#     docker run --gpus all --ipc host -p 8000:8000 -v "$PWD/family:/family" meswitch:vllm
#
# /family holds family.toml and what it names; models of the hub are kept in the volume /models.
ARG VLLM=0.25.0

FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src src
COPY lab lab
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v${VLLM}
COPY --from=wheel /wheels /wheels
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# torch and vLLM stay as the image has them: pip is told their versions (`pip freeze` would name a wheel's file instead)
RUN wheel="$(ls /wheels/*.whl)" \
    && pip list --format=freeze | grep -E '^(torch|vllm|triton)==' > /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}" \
    && rm -r /wheels /tmp/constraints.txt \
    && useradd --create-home --uid 1001 meswitch \
    && install --directory --owner=meswitch /models
ENV HF_HOME=/models
USER 1001
WORKDIR /family
VOLUME ["/models"]
EXPOSE 8000
HEALTHCHECK --start-period=20m --interval=30s --timeout=5s \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["meswitch"]
CMD ["serve", "/family/family.toml", "--engine", "vllm", "--host", "0.0.0.0", "--port", "8000"]
