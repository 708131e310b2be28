"""FLOPs by hand and as torch counts them."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.step import flops
from bench.step.flops import Lengths, Widths
from gadcore.data.groups import GroupTokens
from tests.support.tiny import tiny_model

WIDTHS = Widths(hidden=64, layers=2, query=64, key=32, mlp=96, vocabulary=320)


def test_products_of_a_row_are_those_that_torch_counts() -> None:
    """One response: the packed row is an ordinary sequence. torch counts attention over all pairs, masked or not."""
    model, prompt, response = tiny_model(), 7, 6
    # It knows no FLOPs of the CPU's fused attention.
    model.set_attn_implementation("eager")
    tokens = prompt + response - 1
    with FlopCounterMode(display=False) as counter:
        model.base_model(torch.arange(tokens)[None], use_cache=False)
    widths = Widths.of(model.config)
    head_dim = 32
    masked = tokens * tokens - flops.triangle(tokens)
    expected = counter.get_total_flops() - 2 * 2 * 2 * masked * 2 * head_dim + widths.head(response)
    # Nothing is read of the last layer at the prompt's tokens but the last.
    expected -= widths.layer(prompt - 1, 0, flops.triangle(prompt - 1))
    assert flops.forward(widths, [Lengths(prompt, (response,))]) == expected


def test_a_prompt_counts_once_and_pairs_are_those_of_the_packed_layout() -> None:
    group = Lengths(5, (3, 4))
    packed = GroupTokens(tuple(range(5)), (tuple(range(2)), tuple(range(3))))
    body = WIDTHS.layers * WIDTHS.layer(packed.tokens, packed.tokens, packed.pairs)
    unread = WIDTHS.layer(4, 0, flops.triangle(4))
    assert flops.forward(WIDTHS, [group]) == body - unread + WIDTHS.head(7)
    twice = flops.forward(WIDTHS, [Lengths(5, (3,)), Lengths(5, (4,))])
    alone = WIDTHS.layers * WIDTHS.layer(5, 5, flops.triangle(5))
    assert twice - flops.forward(WIDTHS, [group]) == alone - unread


def test_the_last_layer_of_scores_asks_for_last_tokens_only() -> None:
    full = flops.scores(WIDTHS, [Lengths(5, (3, 4))])
    packed = GroupTokens(tuple(range(5)), (tuple(range(3)), tuple(range(4))))
    saved = WIDTHS.layer(packed.tokens, packed.tokens, packed.pairs) - WIDTHS.layer(2, packed.tokens, 5 + 3 + 5 + 4)
    assert full == 2 * WIDTHS.layer(packed.tokens, packed.tokens, packed.pairs) - saved


def test_the_opponents_schedules_repeat_what_the_packed_step_does_once() -> None:
    # Without a prompt and with one sample nothing is shared: what is left are the passes.
    alone = flops.packed(WIDTHS, 1, 50, 1)
    body = flops.padded(WIDTHS, 1, 51, logits=0)
    head = WIDTHS.head(50)
    assert flops.padded(WIDTHS, 1, 51, logits=50) == body + head
    # 5 of G with the head, one of D for rewards, 3 of D over two rows.
    assert flops.trl(WIDTHS, 1, 50, 1) == 5 * (body + head) + body + 3 * 2 * body
    once = flops.forward(WIDTHS, [Lengths(1, (50,))])
    whole = flops.padded(WIDTHS, 1, 51, logits=51)
    assert flops.literal(WIDTHS, 1, 50, 1) == once + 5 * whole + body + 3 * 2 * body
    assert flops.literal(WIDTHS, 1, 50, 1, recompute=True) == flops.literal(WIDTHS, 1, 50, 1) + whole + 2 * body
    assert alone < flops.trl(WIDTHS, 1, 50, 1) < flops.literal(WIDTHS, 1, 50, 1)
    # Eight samples of a long prompt: the teacher's row is repeated eight times.
    sizes = (WIDTHS, 200, 10, 8)
    assert flops.literal(*sizes) > flops.trl(*sizes) > 4 * flops.packed(*sizes)
