"""Search over placements: how many instances of which shape, where, meet the objective on the fewest GPUs."""
