"""The suites: where each is, what it measures, which of the common options it takes.

A suite's module has

    add_arguments(parser)    the options that are its own; it may have none
    run(**options)           rows, all at once or one by one: a list or an iterator. Raises UserError for options that
                             cannot be, RuntimeError where a measurement breaks off
    key(row)                 where the rows of a file that were not measured again are to stay: what a row is the result
                             of. Rows are written one by one then

Options reach run() by the names of its parameters.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Suite:
    """module: where it is. help: what it measures. threads: takes --threads beside --quick and --out.

    passes_on: the parameter of run() that takes, as a list, what is no option of the suite.
    """

    module: str
    help: str
    threads: bool = False
    passes_on: str | None = None


SUITES = {
    "kernels": Suite("bench.kernels.suite", "CPU timings of every kernel beside its opponents", threads=True),
    "step": Suite(
        "bench.step.suite",
        "the whole GAD step beside TRL and beside the paper's literal schedule, on the CPU",
        threads=True,
    ),
    "trl": Suite("bench.trl.suite", "gadcore's trainer inside TRL beside TRL's own: a group's loss, on the CPU"),
    "soda": Suite("bench.soda.suite", "SODA's step beside TRL's DPOTrainer: tokens a second, on the CPU"),
    "rollout": Suite(
        "bench.rollout.suite",
        "tokens per second of the sampler beside stock vLLM and Hugging Face's generate(), on the CPU",
        threads=True,
    ),
    "gpu": Suite("bench.gpu.suite", "what a first run on a GPU must answer, in stages; skipped where there is none"),
    "traffic": Suite(
        "bench.offline.traffic_suite", "bytes, launches and FLOPs of the Triton kernels under the interpreter"
    ),
    "aot": Suite(
        "bench.offline.aot_suite",
        "registers, spills and shared memory of the Triton kernels, compiled for GPUs that need not be there",
    ),
    "paper": Suite("bench.paper.suite", "the paper's findings on toys: mixture, language, fresh, or all of them"),
    "default": Suite(
        "bench.default.suite",
        "the default job, a run for every seed: sentences, measures by stage, seconds; resumable",
        passes_on="settings",
    ),
    "methods": Suite(
        "bench.methods.suite",
        "SeqKD, SODA and GAD's variants from one start, at equal data and at equal seconds; hours, resumable",
        passes_on="settings",
    ),
    "adapters": Suite(
        "bench.adapters.suite",
        "the GAD step with all weights trained, and with adapters on one base: seconds, memory, tokens per second",
        threads=True,
    ),
    "learning": Suite(
        "bench.learning.suite",
        "the default job with all weights trained and with adapters: does it learn as well? Hours, resumable",
        passes_on="settings",
    ),
    "memory": Suite(
        "bench.memory.suite", "bytes by state of runs that share the device by turns, and a run under a limit"
    ),
    "reshard": Suite(
        "bench.reshard.suite", "plans from FSDP's shards to vLLM's on the meta device: bytes, and seconds to plan"
    ),
    "real": Suite(
        "bench.paper.real",
        "runs on real text, GAD's first, compared over their seconds of training",
        passes_on="settings",
    ),
}

# Modules with files(): what `python -m bench tables` writes; the first also fills the file of its --out.
TABLES = (
    "bench.kernels.tables",
    "bench.step.tables",
    "bench.trl.tables",
    "bench.soda.tables",
    "bench.rollout.tables",
    "bench.memory.tables",
    "bench.adapters.tables",
    "bench.reshard.tables",
    "bench.paper.tables",
    "bench.default.tables",
    "bench.methods.tables",
)
