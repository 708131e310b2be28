"""The paper's findings as small experiments, trained by gadcore's own stages on toy models and toy teachers."""
