"""SODA's step beside TRL's DPOTrainer."""
