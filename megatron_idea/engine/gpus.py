"""What is known of GPU models: memory, bandwidth, peak FLOP/s."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_idea.config import ConfigError

# Dense bf16 FLOP/s of one device, by a part of its name; from NVIDIA's data sheets, SXM parts,
# without sparsity. The first match counts: names of one family contain each other.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 FLOP/s of a device from its name (``torch.cuda.get_device_name``), if known."""
    for part, peak in PEAK_FLOPS.items():
        if part in device_name:
            return peak
    return None


USABLE = 0.9
"""Share of a GPU's memory that a plan may fill: an assumption. The rest is for CUDA, NCCL's
buffers, kernels' workspaces and what the allocator loses to rounding."""


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU, after its data sheet."""

    name: str
    memory_bytes: float
    link_bytes_per_s: float
    """To the other GPUs of its node, one way."""
    gpus_per_node: int

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s."""
        peak = peak_flops(self.name)
        assert peak is not None
        return peak


# NVIDIA's data sheets of each part (SXM). NVLink is given there for both ways together: halved.
GPUS = {
    "a100-40": Gpu("A100", 40e9, 300e9, 8),  # A100 data sheet: 40 GB HBM2, NVLink 600 GB/s
    "a100": Gpu("A100", 80e9, 300e9, 8),  # A100 data sheet: 80 GB HBM2e, NVLink 600 GB/s
    "h100": Gpu("H100", 80e9, 450e9, 8),  # H100 data sheet: 80 GB HBM3, NVLink 900 GB/s
    "h200": Gpu("H200", 141e9, 450e9, 8),  # H200 data sheet: 141 GB HBM3e, NVLink 900 GB/s
    "gh200": Gpu("GH200", 96e9, 450e9, 4),  # GH200 data sheet: 96 GB HBM3, NVLink 900 GB/s
    "b200": Gpu("B200", 180e9, 900e9, 8),  # DGX B200 data sheet: 1,440 GB and 14.4 TB/s for 8
    "gb200": Gpu("GB200", 186e9, 900e9, 4),  # GB200 NVL72 data sheet: 13.4 TB and 130 TB/s for 72
}


def gpu_named(name: str) -> Gpu:
    """Raises: ConfigError that lists the known ones."""
    if name.lower() not in GPUS:
        raise ConfigError(f"--gpu is {name!r}; known GPUs: {', '.join(GPUS)}")
    return GPUS[name.lower()]
