# The server and the page in a container; the model comes from outside.
#
#   docker build -t mmlm .
#   docker run --rm -p 127.0.0.1:8000:8000 -v ./runs/quickstart:/model:ro mmlm
#   docker run … mmlm serve /model --host 0.0.0.0 --ui --auth      with keys in MMLM_API_KEYS
#
# PyTorch comes as the package index has it. PyTorch's own index for CPUs makes a much smaller
# image: name it with  --build-arg TORCH_INDEX=ADDRESS

FROM python:3.12-slim AS build
ARG TORCH_INDEX=
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY mmlm mmlm
COPY train train
COPY eval eval
COPY data_recipes data_recipes
RUN python -m venv /opt/mmlm \
 && env ${TORCH_INDEX:+PIP_INDEX_URL="$TORCH_INDEX"} /opt/mmlm/bin/pip install --no-cache-dir torch torchvision \
 && /opt/mmlm/bin/pip install --no-cache-dir '.[app,encoders,train]'

FROM python:3.12-slim
COPY --from=build /opt/mmlm /opt/mmlm
RUN useradd --create-home --uid 10001 mmlm
USER mmlm
WORKDIR /home/mmlm
ENV PATH=/opt/mmlm/bin:$PATH HF_HUB_DISABLE_TELEMETRY=1 PYTHONUNBUFFERED=1
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=120s CMD ["python", "-c", \
  "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=3)"]
ENTRYPOINT ["mmlm"]
CMD ["serve", "/model", "--host", "0.0.0.0", "--ui"]
