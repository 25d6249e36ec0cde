"""What a user runs: prepare, train, evaluate, predict; each reads top to bottom."""
