# The engine with its command as entry point. From a checkout:
#
#   docker build -t pspg-engine .
#   docker build -t pspg-engine --build-arg TORCH=https://download.pytorch.org/whl/cpu .     # without CUDA, several GB less
#   docker run --rm --gpus all --shm-size=8g --user "$(id -u):$(id -g)" -v "$PWD:/data" pspg-engine train chexpert_phase2
#
# --shm-size: loader processes hand batches over in shared memory, of which a container has 64 MB.
FROM python:3.11-slim

# Where pip finds torch before PyPI, whose build brings CUDA 13; and extras of pyproject.toml.
ARG TORCH=
ARG EXTRAS=dicom

# Triton compiles a launcher for its kernels at their first call.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/pspg-engine
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY configs configs
COPY engine engine
COPY kernels kernels
RUN pip install --no-cache-dir ${TORCH:+--index-url "$TORCH" --extra-index-url https://pypi.org/simple} \
    --constraint constraints.txt ".[$EXTRAS]"

# Any user may run it: caches of torch, triton and the Hub go below HOME.
ENV HOME=/tmp/home
RUN mkdir --mode=1777 /tmp/home
WORKDIR /data
ENTRYPOINT ["pspg-engine"]
CMD ["--help"]
