"""Config of a Llama whose layers differ in FFN width; the class of ``model_type: nemotron-nas``.

An export with ``--layout compact`` carries a copy of this file, for engines that read config
classes from the model folder. It stands alone.
"""

from transformers import LlamaConfig


class Block(dict):
    """A mapping whose keys are attributes, too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class NemotronNASConfig(LlamaConfig):
    """LlamaConfig and ``block_configs``: one ``{"attention": ..., "ffn": ...}`` for each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        widths = [block["ffn"]["intermediate_size"] for block in block_configs]
        if widths:
            kwargs["intermediate_size"] = max(widths)
        super().__init__(**kwargs)
        self.block_configs = [
            Block({part: Block(content) for part, content in block.items()})
            for block in block_configs
        ]
