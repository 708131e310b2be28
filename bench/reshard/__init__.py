"""Plans of how shards become the sampler's, without processes and without weights."""
