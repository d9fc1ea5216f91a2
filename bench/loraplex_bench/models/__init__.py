"""Models made up for benches, with random weights."""
