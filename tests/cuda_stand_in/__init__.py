"""A CUDA device without a GPU: the product's CUDA branches, on the CPU's kernels.

``device.cpp`` is the device, ``build.py`` compiles it, ``device.py`` puts it under ``torch.cuda``.
``transformer_engine.py`` loads Transformer Engine's own Python over kernels in plain PyTorch. What
runs here says nothing about a GPU's speed, its kernels, or NCCL.
"""
