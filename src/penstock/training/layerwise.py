"""A model run one layer at a time over a text, for who wants to change each layer by what it sees.

Holds the weights of one layer and the hidden states of all tokens, float32. Knows layers and tensors by name; no
rounding and no file (a function reads tensors).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from penstock.config.model import ModelConfig
from penstock.nn.doors import Batch
from penstock.nn.layers.linear import Linear
from penstock.nn.layers.rotary import Rotary
from penstock.nn.models import create_model, model_routes
from penstock.training.dense import attention_for

TOKENS_AT_ONCE = 4096


class _Seen(Exception):
    """The matrix of interest has its inputs: the rest of the layer need not run."""


class Matrix:
    """A projection of the current layer. `target`: the parameter's name in the model; `weight` float32 [N, K]."""

    def __init__(self, layers: CalibratedLayers, target: str, linear: Linear) -> None:
        self._layers, self.target, self._linear = layers, target, linear

    @property
    def weight(self) -> Tensor:
        return self._linear.weight.detach()

    def hessian(self) -> Tensor:
        """Mean of x x^T over the text, float32 [K, K], of what comes in through the layer as it is now."""
        total = torch.zeros(self.weight.shape[1], self.weight.shape[1])
        count = 0

        def see(_: nn.Module, inputs: tuple[Tensor]) -> None:
            nonlocal count
            total.addmm_(inputs[0].T, inputs[0])
            count += inputs[0].shape[0]
            raise _Seen

        hook = self._linear.register_forward_pre_hook(see)
        for part in self._layers.parts():
            with contextlib.suppress(_Seen):
                self._layers.run(part)
        hook.remove()
        return total / count

    def replace(self, values: Tensor) -> None:
        self._linear.weight = nn.Parameter(values, requires_grad=False)


class CalibratedLayers:
    """`matrices(n)` for n = 0, 1, ...: layer n is loaded, its matrices handed out, then the text runs through it."""

    def __init__(self, config: ModelConfig, rows: Tensor, read: Callable[[str], Tensor]) -> None:
        """rows int64 [R, S], every row a text of its own; `read(name)`: a tensor of the checkpoint in float32."""
        self._config, self._read = config, read
        self._num_rows, self._length = rows.shape
        windows = [window for window in config.layer_windows if window is not None]
        assert self._length <= min([config.max_position, *windows]), "rows are longer than what every layer sees"
        self._routes = model_routes(config)
        self._shapes = create_model(config, torch.float32, "meta")
        table = next(r.source for r in self._routes if r.target == "embed.weight")
        self._hidden = self._embed(rows, table)
        rotary = Rotary(config.head_dim, config.max_position, config.rope_theta, config.rope_scaling)
        self._cos, self._sin = rotary.gather(torch.arange(self._length), torch.float32)
        self._rows_at_once = max(TOKENS_AT_ONCE // self._length, 1)
        self._layer: nn.Module = nn.Identity()

    def _embed(self, rows: Tensor, table: str) -> Tensor:
        """float32 [R * S, hidden]. A tied table may be stored under the head's name only."""
        try:
            weight = self._read(table)
        except KeyError:
            weight = self._read(next(r.source for r in self._routes if r.target == "head.weight"))
        return weight[rows.view(-1)]

    def matrices(self, number: int) -> Iterator[Matrix]:
        """The projections of a layer in the order they compute; replaced ones are used for what comes after them."""
        layer = self._shapes.layers[number]
        prefix = f"layers.{number}."
        layer.to_empty(device="cpu")
        parameters = dict(layer.named_parameters())
        for route in self._routes:
            if route.target.startswith(prefix):
                parameter = parameters[route.target.removeprefix(prefix)]
                rows = slice(None) if route.rows is None else slice(*route.rows)
                parameter.data[rows] = self._read(route.source)
        self._layer = layer
        for name, module in layer.named_modules():
            if isinstance(module, Linear):
                yield Matrix(self, f"{prefix}{name}.weight", module)
        for part in self.parts():
            self._hidden[part] = self.run(part)
        layer.to_empty(device="meta")

    def parts(self) -> Iterator[slice]:
        """Tokens of some whole rows, all in turn."""
        step = self._rows_at_once * self._length
        for first in range(0, len(self._hidden), step):
            yield slice(first, min(first + step, len(self._hidden)))

    def run(self, part: slice) -> Tensor:
        """The layer's output for these tokens."""
        x = self._hidden[part]
        num_rows = len(x) // self._length
        attention = attention_for(num_rows, self._length, torch.device("cpu"))
        nowhere = torch.empty(0, dtype=torch.int64)  # layers read neither token ids nor positions
        cos, sin = (table.repeat(num_rows, 1, 1) for table in (self._cos, self._sin))
        out: Tensor = self._layer(x, Batch(nowhere, nowhere, attention), cos, sin)
        return out
