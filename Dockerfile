# What every node has: Python, a C++ compiler for the kernels, and the packages of requirements.lock, each by its hash.
# docker build -t mm .
# docker run --rm --gpus all --network host --shm-size 8g -v "$PWD/runs:/mm/runs" mm mm train configs/quickstart/hybrid.yaml
FROM python:3.11-slim-bookworm
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ git make iproute2 openssh-client pdsh \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /mm
COPY requirements.lock .
RUN pip install --no-cache-dir --require-hashes -r requirements.lock
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
CMD ["mm", "env"]
