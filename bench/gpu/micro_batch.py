"""Stage 4: one GRPO micro-batch of a random 3B at 16,384 packed tokens: seconds, share of the peak FLOP/s, and the peak
of memory beside what `plan` predicts of the state `student`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from bench import peak
from bench.gpu.models import (
    QWEN_3B,
    TINY,
    Shape,
    config_of,
    fewer_layers,
    parameters,
    random_model,
    save_settings,
    token_groups,
)
from bench.gpu.place import Place, Row, attempt
from bench.step.flops import Lengths, Widths, forward
from gadcore.config.settings import Config
from gadcore.data.groups import Group, GroupTokens
from gadcore.models.activations import Mode
from gadcore.models.student import Student
from gadcore.plan.command import build_case
from gadcore.plan.memory import Choice, state_memory
from gadcore.plan.settings import PlanSettings
from gadcore.plan.workload import Counted

# groups, tokens of a prompt, of a response less its last, samples: 16,384 packed tokens.
LARGE = (4, 448, 457, 8)
SMALL = (2, 12, 7, 2)
# The least memory first: what does not fit any more must not cost the rest.
MODES: tuple[Mode, ...] = ("full", "selective", "off")
# Of fp32 weights and gradients, and casts to bfloat16; and of the device, left for activations.
BYTES_A_PARAMETER, SHARE = 10, 0.55
REPEATS = 3


def rows(place: Place) -> Iterator[Row]:
    shape = TINY if place.tiny else fewer_layers(QWEN_3B, SHARE * place.memory / BYTES_A_PARAMETER)
    made = token_groups(shape["vocab_size"], *(SMALL if place.tiny else LARGE))
    for mode in MODES:
        yield attempt(f"GRPO, {mode}", partial(_measure, shape, made, mode, place), place)
    yield attempt("log-probs alone", partial(_logprobs, shape, made, place), place)


def config(shape: Shape, folder: Path, mode: Mode, made: Sequence[Group]) -> Config:
    """A run whose student's state is what is measured: fp32 weights, bfloat16 products, no reference policy."""
    group = made[0]
    tokens = sum(_packed(group) for group in made)
    longest = max(len(sample.token_ids) for sample in group.samples)
    return Config.model_validate(
        {
            "student": {"model": save_settings(shape, folder), "autocast": "bfloat16"},
            "data": {"max_prompt_tokens": len(group.prompt.token_ids), "max_response_tokens": longest},
            "rollout": {"group_size": len(group.samples), "engine": "hf"},
            "algorithm": {"kl_coef": 0.0},
            "schedule": {"batch_size": len(made), "micro_batch_tokens": tokens, "activation_checkpointing": mode},
        }
    )


def _packed(group: Group) -> int:
    return len(group.prompt.token_ids) + sum(len(sample.token_ids) - 1 for sample in group.samples)


def predicted(settings: Config, made: Sequence[Group], mode: Mode) -> int:
    """Bytes of the state `student` by the plan for this machine."""
    group = made[0]
    lengths = [len(sample.token_ids) for sample in group.samples]
    mean = sum(lengths) / len(lengths)
    plan = PlanSettings(machine="here", rows=len(made), prompt_tokens=len(group.prompt.token_ids), response_tokens=mean)
    counted = Counted(len(made), float(len(group.prompt.token_ids)), mean, "the bench's own groups")
    case, _ = build_case(settings, plan, torch.get_num_threads(), counted)
    return int(state_memory(case, Choice(mode, settings.schedule.micro_batch_tokens, 0.0), "student").total)


def _student(shape: Shape, settings: Config, mode: Mode, place: Place) -> Student:
    return Student(
        random_model(shape, place.device),
        settings.student,
        settings.algorithm,
        temperature=0.8,
        micro_batch_tokens=settings.schedule.micro_batch_tokens,
        activation_checkpointing=mode,
    )


def _measure(shape: Shape, made: Sequence[Group], mode: Mode, place: Place) -> Row:
    with TemporaryDirectory() as folder:
        settings = config(shape, Path(folder), mode, made)
        plan = predicted(settings, made, mode)
    student = _student(shape, settings, mode, place)
    rewards = [[float(i % 3) for i in range(len(group.samples))] for group in made]

    def step() -> None:
        # As in a run: there are no gradients before its only micro-batch.
        student.model.zero_grad(set_to_none=True)
        student.grpo_backward(made, rewards)

    try:
        first_s = place.seconds(step)
        student.model.zero_grad(set_to_none=True)
        found = _peak(step, place)
    except torch.OutOfMemoryError:
        if plan <= place.memory:
            raise
        # As planned: no failure.
        return {"status": "does not fit", "planned_bytes": plan}
    seconds = min(place.seconds(step) for _ in range(1 if place.tiny else REPEATS))
    flops = 3 * _forward_flops(shape, made)
    return {
        "layers": shape["num_hidden_layers"],
        "parameters": parameters(shape),
        "packed_tokens": settings.schedule.micro_batch_tokens,
        "step_s": seconds,
        "first_s": first_s,
        "tflops": flops / seconds / 1e12,
        "share_of_peak": flops / seconds / place.peak_flops if place.peak_flops else None,
        "peak_bytes": found,
        "planned_bytes": plan,
        "peak_over_plan": found / plan if found else None,
    }


def _logprobs(shape: Shape, made: Sequence[Group], place: Place) -> Row:
    """A pass without gradients, as the reference policy's is."""
    with TemporaryDirectory() as folder:
        settings = config(shape, Path(folder), "full", made)
    student = _student(shape, settings, "full", place)
    tokens = [GroupTokens(group.prompt.token_ids, tuple(s.token_ids for s in group.samples)) for group in made]

    def call() -> None:
        with torch.no_grad():
            for micro in student.packed(tokens, teacher=False):
                student.logprobs(student.model, micro.tokens, 0.8)

    call()
    seconds = min(place.seconds(call) for _ in range(1 if place.tiny else REPEATS))
    flops = _forward_flops(shape, made)
    share = flops / seconds / place.peak_flops if place.peak_flops else None
    return {"step_s": seconds, "tflops": flops / seconds / 1e12, "share_of_peak": share}


def _forward_flops(shape: Shape, made: Sequence[Group]) -> int:
    lengths = [Lengths(len(g.prompt.token_ids), tuple(len(s.token_ids) for s in g.samples)) for g in made]
    return forward(Widths.of(config_of(shape)), lengths)


def _peak(step: Callable[[], None], place: Place) -> int | None:
    """The most bytes of the device that the process held during a step, all it holds included."""
    if not place.on_gpu:
        _, extra = peak.extra_peak(step)
        return None if extra is None else extra + peak.resident("VmRSS")
    place.give_back()
    torch.cuda.reset_peak_memory_stats()
    free, total = torch.cuda.mem_get_info()
    beside = total - free - torch.cuda.memory_reserved()
    step()
    torch.cuda.synchronize()
    return beside + torch.cuda.max_memory_allocated()
