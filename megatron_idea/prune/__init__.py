"""Score, plan, mask, compact: which FFN neurons live on, and how the others leave."""
