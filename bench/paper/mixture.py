"""One Gaussian learns from samples of a mixture of three: which modes does it keep?

A response is one of 128 bins of [-1, 1]. The teacher's probabilities are known, and used for measures alone (and by
the oracle). The student's logits are linear in (x, x^2), so it is a Gaussian over the bins whatever it learns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from bench.paper.toy import SPECIAL, WordTemplate
from gadcore.data.groups import Group

BINS = 128
X = torch.linspace(-1, 1, BINS)
WORDS = tuple(map(str, range(BINS)))
FIRST = len(SPECIAL)  # token id of bin 0


@dataclass(frozen=True)
class Teacher:
    """Gaussians at `means` with `weights` and one standard deviation `sd`."""

    name: str
    means: tuple[float, ...]
    weights: tuple[float, ...]
    sd: float

    @property
    def probabilities(self) -> Tensor:
        """[128]."""
        parts = [
            w * (-0.5 * ((X - m) / self.sd) ** 2).softmax(0) for m, w in zip(self.means, self.weights, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def groups(self, template: WordTemplate, count: int, seed: int) -> list[Group]:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.multinomial(self.probabilities, count, replacement=True, generator=generator)
        # A response is exactly one token: no end marker follows, as after a cut at one token. The prompt says nothing.
        return [template.group(i, WORDS[0], WORDS[bin], finished=False) for i, bin in enumerate(drawn.tolist())]


# The Gaussian that maximises likelihood is no local optimum of the reverse KL in the first geometry. In the second it
# is one, so that following the reverse KL from there, even exactly, leaves all modes where they are.
TEACHERS = (
    Teacher("skewed", (-0.5, 0.1, 0.7), (0.7, 0.2, 0.1), 0.1),
    Teacher("symmetric", (-0.3, 0.0, 0.3), (1 / 3, 1 / 3, 1 / 3), 0.1),
)


def measures(q: Tensor, teacher: Teacher) -> dict[str, Any]:
    """Of the student's probabilities q [128]: forward and reverse KL in nats, mass within 2.5 sd of each mode, and how
    many modes hold more than a quarter of the teacher's mass there."""
    p = teacher.probabilities
    near = torch.stack([(X - m).abs() <= 2.5 * teacher.sd for m in teacher.means])
    mass, expected = (near * q).sum(1), (near * p).sum(1)
    return {
        "forward_kl": kl(p, q),
        "reverse_kl": kl(q, p),
        "on_mode": (near.any(0) * q).sum().item(),
        "modes": int((mass > 0.25 * expected).sum()),
        "mass": mass.tolist(),
    }


def kl(a: Tensor, b: Tensor) -> float:
    """KL(a || b) in nats, probabilities below 1e-12 taken as that."""
    return (a * (a.clamp_min(1e-12).log() - b.clamp_min(1e-12).log())).sum().item()


class ToyConfig(PreTrainedConfig):
    model_type = "toy"

    def __init__(self, hidden_size: int = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden_size, self.vocab_size = hidden_size, FIRST + BINS
        self.num_hidden_layers = self.num_attention_heads = 1


class _Toy(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "model"
    _supports_attention_backend = _supports_sdpa = True


class _Gaussian(nn.Module):
    """Hidden state (mean / sd^2, -1 / (2 sd^2)), the same at every token."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.log_sd = nn.Parameter(torch.zeros(())), nn.Parameter(torch.full((), -0.7))
        self.layers = nn.ModuleList()

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        precision = (-2 * self.log_sd).exp()
        hidden = torch.stack([self.mean * precision, -precision / 2])
        return BaseModelOutputWithPast(last_hidden_state=hidden.expand(*input_ids.shape, 2))


class GaussianPolicy(_Toy):
    """logit(x) = mean x / sd^2 - x^2 / (2 sd^2) through a head [V, 2] that does not learn; special tokens: never."""

    def __init__(self, config: ToyConfig, seed: int) -> None:
        super().__init__(config)
        self.model = _Gaussian()
        self.lm_head = nn.Linear(2, config.vocab_size)
        with torch.no_grad():
            start = torch.rand((), generator=torch.Generator().manual_seed(seed)) - 0.5
            self.model.mean.copy_(start)
            self.lm_head.weight.zero_()[FIRST:] = torch.stack([X, X**2], 1)
            self.lm_head.bias.zero_()[:FIRST] = -1e4
        self.lm_head.requires_grad_(False)

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @torch.no_grad()
    def probabilities(self) -> Tensor:
        """[128]."""
        hidden = self.model(torch.zeros(1, 1, dtype=torch.int64)).last_hidden_state[0]
        return self.lm_head(hidden)[0, FIRST:].softmax(-1)


class _Features(nn.Module):
    """A smooth function of the bin: 16 sines and cosines of its position, one hidden layer."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        angles = X[:, None] * torch.arange(1, 17) * math.pi / 2
        features = torch.cat([angles.sin(), angles.cos()], 1)
        self.register_buffer("features", torch.cat([torch.zeros(FIRST, 32), features]))
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(32, hidden), nn.Tanh())])

    def forward(self, input_ids: Tensor, **kwargs: Any) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=self.layers[0](self.features[input_ids]))


class BinScore(_Toy):
    """A score for every bin."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.model = _Features(config.hidden_size)
        self.score = nn.Linear(config.hidden_size, 1)
