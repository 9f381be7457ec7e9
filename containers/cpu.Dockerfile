# meswitch on a CPU: compress, route and serve.
#
#     docker build -f containers/cpu.Dockerfile -t meswitch:cpu .
#     docker run -p 8000:8000 -v "$PWD/family:/family" meswitch:cpu
#
# /family holds family.toml and what it names; models of the hub are kept in the volume /models.
FROM python:3.12-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE CHANGELOG.md ./
COPY src src
COPY lab lab
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.12-slim-bookworm
COPY constraints.txt /tmp/constraints.txt
# torch first, from its own index: the one of PyPI brings CUDA along
RUN pip install --no-cache-dir --constraint /tmp/constraints.txt --index-url https://download.pytorch.org/whl/cpu \
    --extra-index-url https://pypi.org/simple torch==2.13.0
COPY --from=wheel /wheels /wheels
RUN wheel="$(ls /wheels/*.whl)" \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt "${wheel}[grammar]" \
    && rm -r /wheels /tmp/constraints.txt \
    && useradd --create-home --uid 1000 meswitch \
    && install --directory --owner=meswitch /models
ENV HF_HOME=/models
USER 1000
WORKDIR /family
VOLUME ["/models"]
EXPOSE 8000
HEALTHCHECK --start-period=10m --interval=30s --timeout=5s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["meswitch"]
CMD ["serve", "/family/family.toml", "--host", "0.0.0.0", "--port", "8000"]
