"""gadcore's trainer inside TRL beside TRL's own."""
