"""gadcore: Generative Adversarial Distillation (arXiv 2511.10643) in one engine."""

__version__ = "0.1.0"
