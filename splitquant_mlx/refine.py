"""Train the scales and biases of a quantized model to predict what the original predicts.

Layer by layer, quantization keeps the outputs of each layer; what the errors of all layers do to
the predictions together is not in it. Here the codes stay as they are, and scales, biases and norms
go down the gradient of the KL divergence from the original, on text that the original wrote
itself: the last stage of EfficientQAT (Chen et al., arXiv:2407.11062, section 3.3), or mlx-lm's
DWQ, without a data set.

Scales and biases are trained as u and v in

    w = scale (1 + u) (q - middle) + centre + scale v,

so that one learning rate fits all layers: a step of v moves a group by a share of one level.
"""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from splitquant_mlx.affine import Quantized
from splitquant_mlx.calibrate.blocks import start_pass, tapped
from splitquant_mlx.progress import Progress

LEARNING_RATE = 1e-3
BATCH_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Targets:
    """Hold what the original predicts: its last hidden states, and the layer they go through.

    Attributes:
        states: (texts, length, hidden).
        head: the output layer.
    """

    states: mx.array
    head: Any

    def log_probabilities(self, texts: mx.array) -> mx.array:
        """Return ln p of every next token (len(texts), length, vocabulary)."""
        return _log_softmax(self.head(self.states[texts]))
