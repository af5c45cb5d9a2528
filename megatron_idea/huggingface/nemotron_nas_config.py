"""Config of a Llama whose layers differ in size; the class of ``model_type: nemotron-nas``.

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


def _width(ffn, hidden_size):
    if ffn.get("ffn_mult"):  # two thirds of so many hidden sizes, rounded up to 256
        return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256
    return ffn["intermediate_size"]


class NemotronNASConfig(LlamaConfig):
    """LlamaConfig and ``block_configs``: one ``{"attention": ..., "ffn": ...}`` for each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **kwargs):
        if block_configs:
            hidden_size = kwargs.get("hidden_size", 4096)
            kwargs["intermediate_size"] = max(_width(b["ffn"], hidden_size) for b in block_configs)
        super().__init__(**kwargs)
        self.block_configs = [
            Block({part: Block(content) for part, content in block.items()})
            for block in block_configs
        ]

    def validate_architecture(self):
        """Accept heads that do not divide the hidden size: head_dim is always given."""
