"""Networks as Flax NNX modules."""
