"""What the service says of itself to Prometheus. Names and units by its conventions."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gadcore.models.discriminator import Scores

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """A registry of its own: several services in a process do not meet."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        of = self.registry
        self.requests = Counter("gadcore_requests", "Requests by path and status.", ["path", "status"], registry=of)
        self.request_seconds = Histogram(
            "gadcore_request_seconds", "From a request's body to its answer.", ["path"], buckets=_SECONDS, registry=of
        )
        self.update_seconds = Histogram("gadcore_update_seconds", "Of an update.", buckets=_SECONDS, registry=of)
        self.model_seconds = Gauge("gadcore_model_seconds", "Spent in the model since the start.", registry=of)
        self.duplicates = Counter("gadcore_duplicates", "Requests that had come before.", registry=of)
        self.groups = Counter("gadcore_groups", "Groups trained on.", registry=of)
        self.samples = Counter("gadcore_samples", "Samples trained on.", registry=of)
        self.version = Gauge("gadcore_version", "Of the weights.", registry=of)
        self.waiting = Gauge("gadcore_waiting_groups", "Groups that wait.", registry=of)
        self.asleep = Gauge("gadcore_asleep", "1: the model has left its device.", registry=of)
        self.frozen = Gauge("gadcore_frozen", "1: requests are scored and train nothing.", registry=of)
        self.student_version = Gauge("gadcore_student_version", "The newest that a request has named.", registry=of)
        self.loss = Gauge("gadcore_loss", "Bradley-Terry loss of the last update, before it.", registry=of)
        self.accuracy = Gauge("gadcore_accuracy", "Share of pairs whose teacher scores higher, as loss.", registry=of)
        self.margin = Gauge("gadcore_margin", "Teacher's score less the sample's, as loss.", registry=of)
        self.grad_norm = Gauge("gadcore_grad_norm", "Before clipping.", registry=of)
        self.score = Gauge("gadcore_score_mean", "Of the last update's samples and teachers.", ["of"], registry=of)

    def updated(self, scores: Scores, groups: int) -> None:
        """Notes an update."""
        rewards = [score for group in scores.rewards for score in group]
        self.groups.inc(groups)
        self.samples.inc(len(rewards))
        self.loss.set(scores.loss)
        self.accuracy.set(scores.accuracy)
        self.margin.set(scores.margin)
        self.grad_norm.set(scores.grad_norm or 0.0)
        if rewards:
            self.score.labels("samples").set(sum(rewards) / len(rewards))
            self.score.labels("teacher").set(sum(scores.teacher_scores) / groups)

    def text(self) -> bytes:
        return generate_latest(self.registry)
