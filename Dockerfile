# The CUDA stack: docker build -t gadcore . && docker run --rm --gpus all --shm-size=8g -v "$PWD/runs:/gadcore/runs" gadcore
# What follows `gadcore` takes the place of the last line: make gpu-test, make gpu-bench, make doctor.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        g++ git make python3.12 python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /gadcore
# There is no GPU while an image is built: the stack is named.
ENV GADCORE_STACK=cuda PY=python3.12 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1

# The packages alone: the layer of 10 GB stays as it is where only sources change.
COPY Makefile ./
COPY requirements requirements
RUN make packages

COPY LICENSE README.md pyproject.toml setup.py ./
COPY csrc csrc
COPY kernels kernels
COPY configs configs
COPY gadcore gadcore
COPY bench bench
COPY docs docs
COPY examples examples
COPY tests tests
RUN make setup

CMD ["make", "run"]
