"""One job over several processes: who is in it, and models in shards over all of them."""
