# syntax=docker/dockerfile:1
# One image for every service; what it is, is its first argument: `IMAGE services.gateway --data-dir /data ...`.
# CPU only:  docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu -t ovi-serve:cpu .
ARG PYTHON=python:3.12.12-slim-bookworm

FROM ${PYTHON} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /source
RUN pip install "grpcio-tools>=1.80,<2" "setuptools>=77"
COPY protos protos
RUN python -m grpc_tools.protoc -I protos --python_out=. --grpc_python_out=. $(find protos -name '*.proto') \
    && find ovi -type d -exec touch {}/__init__.py \;
COPY pyproject.toml README.md LICENSE ./
COPY shared shared
COPY services services
COPY cli cli
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

FROM ${PYTHON} AS packages
ARG TORCH=torch==2.13.0
ARG TORCH_INDEX=https://pypi.org/simple
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/ovi
# torch apart from the rest, so that a change of the services makes a small layer.
RUN /opt/ovi/bin/pip install --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple "${TORCH}"
COPY --from=build /wheels /wheels
RUN /opt/ovi/bin/pip install /wheels/*.whl

FROM ${PYTHON} AS run
# Triton compiles a launcher for each kernel: a C compiler and Python's headers, which the base has, are part of running.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 ovi && useradd --uid 10001 --gid ovi --home-dir /var/cache/ovi --no-create-home ovi \
    && install --directory --owner=ovi --group=ovi --mode=0700 /data /var/cache/ovi /tmp/ovi-turns-10001 \
    && install --directory --owner=ovi --group=ovi /checkpoints
COPY --from=packages /opt/ovi /opt/ovi
# As `ovi up` sets them, for the reasons that stand in cli/stack/plan.py.
# and GPU memory leaves fewer pieces that fit nothing.
ENV PATH=/opt/ovi/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    MALLOC_MMAP_THRESHOLD_=33554432 \
    MALLOC_TRIM_THRESHOLD_=536870912 \
    PYTORCH_ALLOC_CONF=expandable_segments:True \
    OMP_WAIT_POLICY=PASSIVE \
    TRITON_CACHE_DIR=/var/cache/ovi/triton \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
WORKDIR /data
USER 10001:10001
ENTRYPOINT ["python", "-P", "-m"]
CMD ["services.gateway", "--help"]
