"""gadcore: Generative Adversarial Distillation (arXiv 2511.10643) in one engine.

    from gadcore import Discriminator, Student

is the door for programs of one's own (docs/guide/library.md). `import gadcore` alone loads nothing else: what a name
stands for is imported as it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gadcore.config.settings import AlgorithmSettings as AlgorithmSettings
    from gadcore.config.settings import DiscriminatorSettings as DiscriminatorSettings
    from gadcore.config.settings import StudentSettings as StudentSettings
    from gadcore.data.groups import Group as Group
    from gadcore.models.discriminator import Discriminator as Discriminator
    from gadcore.models.discriminator import Scores as Scores
    from gadcore.models.student import Student as Student

__version__ = "0.1.0"

_HOMES = {
    "AlgorithmSettings": "gadcore.config.settings",
    "Discriminator": "gadcore.models.discriminator",
    "DiscriminatorSettings": "gadcore.config.settings",
    "Group": "gadcore.data.groups",
    "Scores": "gadcore.models.discriminator",
    "Student": "gadcore.models.student",
    "StudentSettings": "gadcore.config.settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
