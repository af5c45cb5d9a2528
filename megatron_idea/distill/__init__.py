"""Distillation: a pruned model learns from a larger one's predictions."""
