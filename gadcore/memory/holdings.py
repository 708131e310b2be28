"""What a run holds in memory, and which of it each state of a step needs.

    synchronise             the student's new weights reach the engine
    rollout                 the engine samples
    discriminator           D scores the samples, and its gradient is made
    discriminator_update    its optimizer step
    reference               the reference policy's log-probs of the whole batch
    student                 G's gradient is made
    student_update          its optimizer step
    rest                    nothing is computed on the device: checkpoints, a fresh discriminator, the end of a run

Where weights are frozen under adapters, they are a holding of every state in which one of the models computes, and
those of a model its adapters alone.
Moments are there for the step alone, not beside activations; the reference policy not beside G. Gradients live only
inside their model's two states: the optimizer step clears them. Imports no torch: the planner reads it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

State = Literal[
    "synchronise", "rollout", "discriminator", "discriminator_update", "reference", "student", "student_update", "rest"
]
# A name of HOLDINGS.
Holding = str
# What an engine wakes by itself.
EnginePart = Literal["weights", "kv_cache"]
HOLDINGS: tuple[Holding, ...] = (
    "base.parameters",
    "student.parameters",
    "student.gradients",
    "student.optimizer",
    "reference.parameters",
    "discriminator.parameters",
    "discriminator.gradients",
    "discriminator.optimizer",
    "engine.weights",
    "engine.kv_cache",
)

_NEEDS: Mapping[State, frozenset[Holding]] = {
    "synchronise": frozenset({"student.parameters", "engine.weights"}),
    "rollout": frozenset({"engine.weights", "engine.kv_cache"}),
    "discriminator": frozenset({"discriminator.parameters", "discriminator.gradients"}),
    "discriminator_update": frozenset(
        {"discriminator.parameters", "discriminator.gradients", "discriminator.optimizer"}
    ),
    "reference": frozenset({"reference.parameters"}),
    "student": frozenset({"student.parameters", "student.gradients"}),
    "student_update": frozenset({"student.parameters", "student.gradients", "student.optimizer"}),
    "rest": frozenset(),
}
# The frozen weights under adapters, which all roles compute with: of every state, but see needs(). Without adapters
# there are none.
ALWAYS: frozenset[Holding] = frozenset({"base.parameters"})
NEEDS: Mapping[State, frozenset[Holding]] = {state: needed | ALWAYS for state, needed in _NEEDS.items()}

# What a state writes to, and has to be kept anew when it leaves the device.
CHANGES: Mapping[State, frozenset[Holding]] = {
    "synchronise": frozenset(),
    "rollout": frozenset(),
    "discriminator": frozenset(),
    "discriminator_update": frozenset({"discriminator.parameters", "discriminator.optimizer"}),
    "reference": frozenset(),
    "student": frozenset(),
    "student_update": frozenset({"student.parameters", "student.optimizer"}),
    "rest": frozenset(),
}

# What follows in a step of the GAD stage; where there is no reference policy, its state is left out.
FOLLOWS: Mapping[State, State] = {
    "synchronise": "rollout",
    "rollout": "discriminator",
    "discriminator": "discriminator_update",
    "discriminator_update": "reference",
    "reference": "student",
    "student": "student_update",
    "student_update": "synchronise",
}

# Where a model's work of a step is done: its time is theirs together.
WORK_OF: Mapping[str, tuple[State, ...]] = {
    "student": ("reference", "student", "student_update"),
    "discriminator": ("discriminator", "discriminator_update"),
}

# The engine's holdings, and what it calls them.
ENGINE_PARTS: Mapping[Holding, EnginePart] = {"engine.weights": "weights", "engine.kv_cache": "kv_cache"}


def engine_parts(state: State) -> list[EnginePart]:
    """What of the engine must be awake in a state; nothing: it sleeps."""
    return [part for holding, part in ENGINE_PARTS.items() if holding in NEEDS[state]]


def needs(state: State, *, shared: bool) -> frozenset[Holding]:
    """What must be on the device in a state.

    shared: trainer and engine have one copy of the student's weights, so that "engine.weights" is no holding of its
    own: whoever needs it needs "student.parameters". Else it samples without the trainer's base, as large as its own.
    """
    needed = NEEDS[state]
    if not shared and state == "rollout":
        return needed - ALWAYS
    if shared and "engine.weights" in needed:
        return needed - {"engine.weights"} | {"student.parameters"}
    return needed
