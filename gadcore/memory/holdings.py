"""What a run holds in memory, and which of it each state of a step needs.

    synchronise     the student's new weights reach the engine
    rollout         the engine samples
    discriminator   D scores the samples and is updated
    student         G is updated, beside the reference policy
    rest            nothing is computed on the device: checkpoints, a fresh discriminator, the end of a run

Gradients live only inside their own state: the optimizer step clears them. Imports no torch: the planner reads it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

State = Literal["synchronise", "rollout", "discriminator", "student", "rest"]
# A name of HOLDINGS.
Holding = str
# What an engine wakes by itself.
EnginePart = Literal["weights", "kv_cache"]
HOLDINGS: tuple[Holding, ...] = (
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

NEEDS: Mapping[State, frozenset[Holding]] = {
    "synchronise": frozenset({"student.parameters", "engine.weights"}),
    "rollout": frozenset({"engine.weights", "engine.kv_cache"}),
    "discriminator": frozenset({"discriminator.parameters", "discriminator.gradients", "discriminator.optimizer"}),
    "student": frozenset({"student.parameters", "student.gradients", "student.optimizer", "reference.parameters"}),
    "rest": frozenset(),
}

# What a state writes to, and has to be kept anew when it leaves the device.
CHANGES: Mapping[State, frozenset[Holding]] = {
    "synchronise": frozenset(),
    "rollout": frozenset(),
    "discriminator": frozenset({"discriminator.parameters", "discriminator.optimizer"}),
    "student": frozenset({"student.parameters", "student.optimizer"}),
    "rest": frozenset(),
}

# What follows in a step of the GAD stage.
FOLLOWS: Mapping[State, State] = {
    "synchronise": "rollout",
    "rollout": "discriminator",
    "discriminator": "student",
    "student": "synchronise",
}


# The engine's holdings, and what it calls them.
ENGINE_PARTS: Mapping[Holding, EnginePart] = {"engine.weights": "weights", "engine.kv_cache": "kv_cache"}


def engine_parts(state: State) -> list[EnginePart]:
    """What of the engine must be awake in a state; nothing: it sleeps."""
    return [part for holding, part in ENGINE_PARTS.items() if holding in NEEDS[state]]


def needs(state: State, *, shared: bool) -> frozenset[Holding]:
    """What must be on the device in a state.

    shared: trainer and engine have one copy of the student's weights, so that "engine.weights" is no holding of its
    own: whoever needs it needs "student.parameters".
    """
    needed = NEEDS[state]
    if shared and "engine.weights" in needed:
        return needed - {"engine.weights"} | {"student.parameters"}
    return needed
