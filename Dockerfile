# The server of `unmasked serve`, on a CPU. Build it in the repository's root:
#
#     docker build -t unmasked .
#     docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/runs/law/model:/models/law:ro" unmasked /models/law
#
# For a GPU: --build-arg TORCH_INDEX= (PyPI's torch brings CUDA) and `docker run --gpus all`.

FROM python:3.12-slim AS built
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/unmasked
ENV PATH=/opt/unmasked/bin:$PATH
WORKDIR /source

# torch is by far the largest layer, and changes least; then the other libraries; then the package.
COPY constraints.txt ./
RUN pip install --constraint constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch
COPY pyproject.toml ./
RUN mkdir -p src/unmasked \
    && echo '__version__ = "0"' > src/unmasked/__init__.py \
    && touch README.md LICENSE \
    && pip install --constraint constraints.txt '.[serve]' \
    && pip uninstall --yes unmasked
COPY README.md LICENSE ./
COPY src src
RUN pip install --no-deps .

FROM python:3.12-slim
RUN useradd --system --uid 10001 --create-home --home-dir /home/unmasked unmasked
COPY --from=built /opt/unmasked /opt/unmasked
ENV PATH=/opt/unmasked/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1 PYTHONDONTWRITEBYTECODE=1
USER 10001
WORKDIR /home/unmasked
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s --interval=10s --timeout=5s CMD ["python", "-c", \
    "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["unmasked", "serve", "--host", "0.0.0.0"]
CMD ["nano"]
