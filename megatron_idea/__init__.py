"""Train an enlarged GPT, prune it while it trains, ship the small one: one job, one curve."""

from megatron_idea.engine.core_versions import import_without_triton

__version__ = "0.1.0"

import_without_triton()
