"""The kernels without the engine: python examples/kernels_alone.py

The GRPO loss of a packed batch straight from hidden states, with all gradients and without logits of
[tokens, vocabulary], beside the same loss written out.
"""

import torch

from gadcore.kernels.layout import GroupLayout
from gadcore.kernels.linear_grpo_loss import linear_grpo_loss

prompts, samples, width, vocabulary, temperature = 2, 8, 64, 1000, 0.8
torch.manual_seed(0)
lengths = torch.randint(3, 12, (prompts * samples,))  # response tokens of every sample
count = int(lengths.sum())
hidden = torch.randn(count, width, dtype=torch.float64, requires_grad=True)  # the states that predict them
head = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True)
tokens = torch.randint(0, vocabulary, (count,))
rewards = torch.randn(prompts * samples, dtype=torch.float64)

groups = GroupLayout.of([samples] * prompts, teacher=False, lengths=lengths.tolist())
result = linear_grpo_loss(
    hidden, head, tokens, groups, rewards=rewards, ref_logprob=None, temperature=temperature,
    clip_low=0.2, clip_high=0.2, kl_coef=0.0, denominator=count,
)  # fmt: skip
fused = torch.autograd.grad(result.loss, (hidden, head))

logprob = (hidden @ head.T / temperature).log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)
grouped = rewards.view(prompts, samples)
advantage = (grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-6)
ratio = (logprob - logprob.detach()).exp()  # one update a batch: the ratio is 1, its gradient is not
loss = -(ratio * advantage.view(-1).repeat_interleave(lengths)).sum() / count
literal = torch.autograd.grad(loss, (hidden, head))
print("loss", result.loss.item(), "written out", loss.item())
print("gradients differ by", max(float((a - b).abs().max()) for a, b in zip(fused, literal, strict=True)))
