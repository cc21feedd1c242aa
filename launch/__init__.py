"""What a person runs: grids of training runs, their state, their tables."""
