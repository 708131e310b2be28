"""Settings: what they are, how they are read, and the device that they name."""
