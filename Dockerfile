# The service. Build arguments: BASE, an image with Python 3.11 or later as python3; TORCH_INDEX, the index of torch's
# wheels (by default those for CPUs); PIP_INDEX_URL, the index of everything else.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG PIP_INDEX_URL
WORKDIR /source
RUN python3 -m venv /opt/normsearch
# What it depends on changes less often than it does itself.
COPY pyproject.toml README.md LICENSE ./
COPY normsearch/__init__.py normsearch/
RUN /opt/normsearch/bin/pip install --no-cache-dir --index-url "${TORCH_INDEX}" "torch>=2.10" "torchvision>=0.25" \
    && /opt/normsearch/bin/pip install --no-cache-dir ".[onnx,service,s3]"
COPY normsearch normsearch
COPY api api
# Compiled here: the image's files are never written again.
RUN /opt/normsearch/bin/pip install --no-cache-dir --no-deps --force-reinstall . \
    && /opt/normsearch/bin/pip uninstall --yes pip \
    && find /opt/normsearch/lib -type d \( -name tests -o -name test \) -path "*/site-packages/*" -prune -exec rm -r {} + \
    && rm -r /opt/normsearch/lib/python3*/site-packages/torch/include \
    && python3 -m compileall -q api

FROM ${BASE}
RUN useradd --no-log-init --no-create-home --uid 10001 normsearch \
    && install --directory --owner=normsearch --mode=0700 /data
COPY --from=build /opt/normsearch /opt/normsearch
COPY --from=build /source/api /srv/api
WORKDIR /srv
ENV PATH=/opt/normsearch/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    NORMSEARCH_DATA=/data
USER 10001
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=4)"]
ENTRYPOINT ["python", "-m", "api"]
CMD ["serve", "--host", "0.0.0.0"]
