# The program on top of an image that brings torch, Transformer Engine and apex; none of them is
# replaced, and the build fails if pip would.
#
#   docker build -t megatron-idea .
#   docker build -t megatron-idea --build-arg BASE=<an image with Python 3.11+ and torch 2.10+> .
#
# For Slurm: CONTAINER=<this image> bash examples/launch.sh (pyxis), or CONTAINER_RUNTIME=apptainer.
# Neither has to run the entry point or to be the user below: the program is on PATH, readable by
# all, and writes only where it is told to.
ARG BASE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${BASE}

SHELL ["/bin/bash", "-o", "pipefail", "-c"]

# The base's own list of versions would hold back packages that we need newer; ours is made below.
# The working directory is not searched for modules: kernels/ there would hide a package.
ENV PIP_CONSTRAINT="" \
    PIP_BREAK_SYSTEM_PACKAGES=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONSAFEPATH=1

COPY . /opt/megatron_idea
WORKDIR /opt/megatron_idea

# What the base was built for one another stays: torch, what is compiled against it, and CUDA's parts.
RUN set -eu; \
    base_versions() { \
        python3 -m pip list --format=freeze \
            | grep -iE '^(torch|torchvision|torchaudio|(pytorch[-_])?triton|transformer[-_]engine[^=]*|apex|flash[-_]attn[^=]*|nvidia-[^=]*)==' \
            | sort || true; \
    }; \
    base_versions >/opt/megatron_idea/base.txt; \
    grep -i '^torch==' base.txt || { echo "the base image has no torch" >&2; exit 1; }; \
    python3 -m pip install --no-cache-dir --constraint base.txt . ; \
    base_versions >after.txt; \
    diff base.txt after.txt || { echo "pip changed what the base brings" >&2; exit 1; }; \
    python3 -c 'import megatron_idea._C' || { echo "the C++ extension was not built" >&2; exit 1; }; \
    rm -rf build after.txt ./*.egg-info; \
    chmod -R a+rX /opt/megatron_idea

RUN useradd --create-home --uid 10001 trainer
USER 10001

# Ends the build when something required is missing or a tiny run on the CPU fails.
RUN megatron-idea doctor

CMD ["megatron-idea", "doctor"]
