"""The two models: student and discriminator, over any Hugging Face decoder."""
