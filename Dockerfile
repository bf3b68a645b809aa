# Everything a run needs; the project itself is mounted by script/run_docker.sh. The wheels bring their own CUDA.
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# a compiler for torch.compile
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

COPY requirements.txt /tmp/requirements.txt
RUN pip install --no-cache-dir -r /tmp/requirements.txt

WORKDIR /workspace
COPY . /workspace
CMD ["python", "train_split.py", "--help"]
