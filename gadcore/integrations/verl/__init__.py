"""GAD in verl (0.9): a trainer whose critic is the discriminator, and a reward manager for the service."""
