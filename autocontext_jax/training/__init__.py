"""Loss, optimiser, step, sharding, checkpoints and logs."""
