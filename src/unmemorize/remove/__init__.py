"""Remove: a closed gate written into the weights, or the neurons cut out, ending in a plain checkpoint."""
