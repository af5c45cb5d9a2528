"""``python -m megatron_idea``: the same commands as ``megatron-idea``."""

from megatron_idea.cli import main

if __name__ == "__main__":
    main()
