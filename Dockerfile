# vlmtune on a host with an NVIDIA GPU and its container toolkit:
#     docker build -t vlmtune .
#     docker run --gpus all --shm-size 8g -v $PWD/data:/data -v $PWD/out:/out vlmtune \
#         tune --config configs/llava-1.5-7b.yaml --data_path /data --output_dir /out/search
# torch's wheels bring their own CUDA libraries; a compiler is there for torch.compile.
FROM python:3.12-slim-bookworm

# Debian removes old versions of packages, so a pinned one could not be installed any more.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /work
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY vlmtune vlmtune
RUN pip install --no-cache-dir -c constraints.txt "$(grep '^torch==' constraints.txt)" \
    "$(grep '^torchvision==' constraints.txt)" \
    && pip install --no-cache-dir -c constraints.txt .
COPY configs configs
COPY ray_jobs ray_jobs

# Prepared rows and downloaded models stay in this volume.
ENV HF_HOME=/cache/huggingface XDG_CACHE_HOME=/cache
VOLUME /cache

ENTRYPOINT ["vlmtune"]
CMD ["--help"]
