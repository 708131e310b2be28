"""The peak of a training pass on one GPU: the fullest of the moments that a micro-batch goes through.

    head    everything is kept for the backward pass, and the output head computes its loss with all gradients
    layer   the backward pass begins: what the last whole layer computes again, and gradients on their way
    end     it ends: one layer is left, and all gradients are there, the embedding's as a whole beside them

Beside what is held. With a single micro-batch gradients appear as activations go: what of them is not there yet is
taken off. The stand-in for a GPU takes the same bytes within a tenth (tests/rehearsal/test_plan_peaks.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from gadcore.models.activations import Mode
from gadcore.plan.activations import layer_bytes
from gadcore.plan.dimensions import Dimensions


@dataclass(frozen=True)
class Pass:
    """d: of the model. tokens: packed, of the largest micro-batch; responses: those that the student predicts, 0 for a
    discriminator, which reads a few last tokens. single: there is one micro-batch.

    weights, gradients, products: bytes of a number, see gadcore.plan.memory.Precision; autocast: products read casts of
    wider weights. logits_bytes: of the logits that the head holds at a time. frozen: adapters
    are trained alone, so that no weight has a gradient.
    """

    d: Dimensions
    mode: Mode
    tokens: float
    responses: float
    single: bool
    weights: int
    gradients: int
    products: int
    autocast: bool
    logits_bytes: float
    frozen: bool = False

    def _layer(self, mode: Mode) -> float:
        """Bytes that a layer keeps of all tokens."""
        each = layer_bytes(self.d, mode, autocast=self.autocast, item=self.weights, again=False)
        return self.tokens * each * self.d.kept_scale.get(mode, 1.0)

    @property
    def _kept(self) -> float:
        """Of all layers, the last norm, the rotation and the token ids."""
        d, layers = self.d, float(self.d.layers)
        around = self.tokens * (2 * self.weights * d.query / d.heads + 12)
        if self.responses:
            return layers * self._layer(self.mode) + around + self.tokens * self.weights * d.hidden
        # A discriminator's last layer keeps its input, the norm of it, keys and values: queries are a few.
        last = self.tokens * (self.weights * d.hidden + self.products * (d.hidden + 3 * d.key))
        return (layers - 1) * self._layer(self.mode) + min(last, self._layer(self.mode)) + around

    @property
    def _again(self) -> float:
        """What a layer holds that is computed again."""
        return 0.0 if self.mode == "off" else self._layer("off")

    @property
    def _passing(self) -> float:
        """Gradients inside a layer: of the gated activation and what it read, and of the residual stream."""
        return self.tokens * (3 * self.d.mlp * self.products + self.d.hidden * (self.products + self.weights))

    def _casts(self, layers: int) -> float:
        return self.products * layers * self.d.matrices if self.autocast else 0.0

    def _at_head(self) -> dict[str, float]:
        d, rows = self.d, self.responses
        if not rows:
            return {}
        logits = rows * d.vocabulary * 4
        # Several chunks of logits sum the gradient of the matrix in float32.
        summed = 4 if self.autocast and logits > self.logits_bytes else self.products
        states = rows * d.hidden * (2 * self.weights + 2 * self.products)
        matrix = 0 if self.frozen else d.head * (summed + (self.products if self.autocast else 0))
        all_layers = self.d.layers if self.mode == "off" else 0
        return {
            "activations": self._kept,
            "casts of the weights": self._casts(all_layers),
            "output head": states + min(logits, self.logits_bytes) + matrix,
        }

    def _at_layer(self) -> dict[str, float]:
        head = self.d.head * self.products if self.responses and not self.frozen else 0
        return {
            "activations": self._kept + self._again,
            "casts of the weights": self._casts(self.d.layers if self.mode == "off" else 1),
            "gradients on their way": self._passing + head,
        }

    def _at_end(self) -> dict[str, float]:
        # Made whole before it is added to what is there: to that of a tied head, or of an earlier micro-batch. One that
        # is summed in a wider dtype is cast first.
        whole = not self.frozen and (self.responses and self.d.tied or not self.single)
        wider = self.gradients if self.gradients > self.weights else 0
        return {
            "activations": self._layer("off"),
            "casts of the weights": self._casts(1),
            "gradients on their way": self._passing + (self.d.head * (self.weights + wider) if whole else 0.0),
        }

    def fullest(self, gradients: float) -> dict[str, float]:
        """Bytes by what they are for, at the fullest moment. gradients: bytes of all, which are held."""
        # Of the head's matrix the gradient is a moment's own; the layers' come after their turn.
        not_yet = gradients if self.single else 0.0
        moments = [(parts, not_yet) for parts in (self._at_head(), self._at_layer()) if parts] + [(self._at_end(), 0.0)]
        parts, missing = max(moments, key=lambda moment: sum(moment[0].values()) - moment[1])
        return {**parts, "activations": parts["activations"] - missing}
