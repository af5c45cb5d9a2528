"""Train an enlarged GPT, prune it while it trains, ship the small one: one job, one curve."""

__version__ = "0.1.0"
