"""Networks of many agents as stacked tensors: one batched product serves all, and gradients are written out.

M networks of one shape. All their parameters lie in one flat tensor, layer by layer, for one step of the optimiser:

    | W0 (M, in, h0) | b0 (M, 1, h0) | W1 (M, h0, h1) | b1 (M, 1, h1) | ... | W last (M, out, h) | b last (M, out, 1) |

Hidden activations are (M, rows, width) and outputs (M, out, rows), with the last weight stored as (out, h): BLAS
libraries are up to ten times slower on products whose last dimension is small, and no product here has such a one
except with few inputs. Autograd would cost the small networks as much again as their products; the tests compare.
"""

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

LOW = torch.bfloat16


class Workspace:
    """Activations and their gradients, allocated once: fresh memory costs as much as what is done with it.

    `rows` per network are passed forward; the first `trained_rows` of them, or all, backward. Networks that are used
    one after the other share a workspace, which then stays in the cache; `first` lends it to fewer of them.
    """

    def __init__(
        self, networks: int, rows: int, hidden: Sequence[int], like: Tensor, trained_rows: int | None = None,
        low: bool = False,
    ):  # fmt: skip
        def buffers(count: int, dtype: torch.dtype) -> list[Tensor]:
            return [torch.empty(networks, count, width, dtype=dtype, device=like.device) for width in hidden]

        self.trained_rows = rows if trained_rows is None else trained_rows
        self.hidden, self.gradients = buffers(rows, like.dtype), buffers(self.trained_rows, like.dtype)
        self.low = low
        if low:
            self.low_hidden, self.low_products = buffers(rows, LOW), buffers(rows, LOW)
            self.low_gradients, self.low_below = buffers(self.trained_rows, LOW), buffers(self.trained_rows, LOW)

    def first(self, networks: int) -> "Workspace":
        """Return the part of the first `networks` networks, in the same memory."""
        part = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, list):
                setattr(part, name, [buffer[:networks] for buffer in value])
        return part


class StackedMlp:
    """M perceptrons: ReLU layers of the widths `hidden`, then a linear one.

    With `low`, products between hidden layers are taken in bfloat16 copies of the float32 parameters; the first and
    the last layer, a tenth of the work, stay in full precision, since observations and action values need it.
    """

    def __init__(
        self, networks: int, inputs: int, hidden: Sequence[int], outputs: int, like: Tensor, low: bool = False
    ):
        self.layers = len(hidden)
        self._fan_in = [inputs, *hidden]
        weights = [(networks, a, b) for a, b in zip([inputs, *hidden], hidden, strict=False)]
        biases = [(networks, 1, width) for width in hidden]
        weights, biases = [*weights, (networks, outputs, hidden[-1])], [*biases, (networks, outputs, 1)]
        self._shapes = [shape for pair in zip(weights, biases, strict=True) for shape in pair]
        size = sum(math.prod(shape) for shape in self._shapes)
        self.parameters = torch.zeros(size, dtype=like.dtype, device=like.device)
        self.weights, self.biases = self._views(self.parameters)
        self.gradients = torch.zeros_like(self.parameters)
        self._weight_gradients, self._bias_gradients = self._views(self.gradients)
        self._low: list[Tensor | None] = [None] * (self.layers + 1)
        if low:
            self._low[1:-1] = [weight.to(LOW) for weight in self.weights[1:-1]]

    def _views(self, flat: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        sizes = [math.prod(shape) for shape in self._shapes]
        views = [part.view(shape) for part, shape in zip(flat.split(sizes), self._shapes, strict=True)]
        return views[::2], views[1::2]

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Cut `flat`, the parameters or an optimiser's numbers for them, into its parts by name, networks first."""
        weights, biases = self._views(flat)
        return {f"{n}.weight": part for n, part in enumerate(weights)} | {f"{n}.bias": p for n, p in enumerate(biases)}

    def initialise(self, network: int, generator: torch.Generator) -> None:
        """Draw one network's weights and biases, uniform in +-1/sqrt(fan in) as torch's linear layers are."""
        for weight, bias, fan_in in zip(self.weights, self.biases, self._fan_in, strict=True):
            bound = 1.0 / math.sqrt(fan_in)
            for tensor in (weight[network], bias[network]):
                tensor.copy_(torch.empty(tensor.shape).uniform_(-bound, bound, generator=generator))

    def network(self, index: int) -> tuple[list[Tensor], list[Tensor]]:
        """Return one network's weights, (in, out) but the last (out, in), and its biases (n,), as views."""
        return [weight[index] for weight in self.weights], [bias[index].flatten() for bias in self.biases]

    def refresh(self) -> None:
        """Take changed parameters over into the bfloat16 copies, if there are any."""
        for low, weight in zip(self._low, self.weights, strict=True):
            if low is not None:
                low.copy_(weight)

    def forward(self, inputs: Tensor, space: Workspace | None = None) -> Tensor:
        """Map (M, rows, in) to (M, out, rows). `space` keeps what `backward` needs; without it, full precision."""
        below = inputs
        for layer in range(self.layers):
            hidden, low = (None, None) if space is None else (space.hidden[layer], self._low[layer])
            if space is not None and low is not None:
                product = torch.bmm(space.low_hidden[layer - 1], low, out=space.low_products[layer])
                below = space.hidden[layer].copy_(product).add_(self.biases[layer])
            else:
                below = torch.baddbmm(self.biases[layer], below, self.weights[layer], out=hidden)
            below.relu_()
            if space is not None and self._low[layer + 1] is not None:
                space.low_hidden[layer].copy_(below)
        return torch.baddbmm(self.biases[-1], self.weights[-1], below.transpose(1, 2))

    def backward(self, inputs: Tensor, output_gradient: Tensor, space: Workspace) -> None:
        """Write the gradients of all parameters from that of the outputs (M, out, trained rows).

        `inputs` (M, rows, in) are those of the last `forward` with `space`.
        """
        rows = space.trained_rows
        torch.bmm(output_gradient, space.hidden[-1][:, :rows], out=self._weight_gradients[-1])
        torch.sum(output_gradient, 2, keepdim=True, out=self._bias_gradients[-1])
        gradient = self._top_gradient(output_gradient, space)
        for layer in range(self.layers - 1, -1, -1):
            torch.sum(gradient, 1, keepdim=True, out=self._bias_gradients[layer])
            below = inputs if layer == 0 else space.hidden[layer - 1]
            if self._low[layer] is None:
                torch.bmm(below[:, :rows].transpose(1, 2), gradient, out=self._weight_gradients[layer])
            else:
                # of trained rows among others, bfloat16 products would be a quarter slower than the copy makes them
                below, low = space.low_hidden[layer - 1][:, :rows].contiguous(), space.low_gradients[layer]
                product = torch.bmm(below.transpose(1, 2), low.copy_(gradient))
                self._weight_gradients[layer].copy_(product)
            if layer > 0:
                gradient = self._gradient_below(layer, gradient, space)

    def input_gradient(self, output_gradient: Tensor, space: Workspace, first: int) -> Tensor:
        """Return the gradient (M, in - first, rows) of the inputs from column `first` on; parameters get none."""
        gradient = self._top_gradient(output_gradient, space)
        for layer in range(self.layers - 1, 0, -1):
            if space.low:
                space.low_gradients[layer].copy_(gradient)
            gradient = self._gradient_below(layer, gradient, space)
        return torch.bmm(self.weights[0][:, first:], gradient.transpose(1, 2))

    def _top_gradient(self, output_gradient: Tensor, space: Workspace) -> Tensor:
        """Gradient (M, rows, width) of the last hidden layer before its ReLU."""
        gradient = space.gradients[-1]
        if output_gradient.shape[1] == 1:
            torch.mul(output_gradient.transpose(1, 2), self.weights[-1], out=gradient)
        else:
            torch.bmm(output_gradient.transpose(1, 2), self.weights[-1], out=gradient)
        return _through_relu(gradient, space.hidden[-1])

    def _gradient_below(self, layer: int, gradient: Tensor, space: Workspace) -> Tensor:
        """Gradient of hidden layer `layer - 1` before its ReLU, from that of `layer`."""
        below, low = space.gradients[layer - 1], self._low[layer]
        if low is None:
            torch.bmm(gradient, self.weights[layer].transpose(1, 2), out=below)
        else:
            product = space.low_below[layer - 1]
            below.copy_(torch.bmm(space.low_gradients[layer], low.transpose(1, 2), out=product))
        return _through_relu(below, space.hidden[layer - 1])


def _through_relu(gradient: Tensor, activation: Tensor) -> Tensor:
    """Set `gradient` to 0 in place where a ReLU gave 0; torch's own kernel, in one pass."""
    activation = activation[:, : gradient.shape[1]]
    return torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0.0, grad_input=gradient)


class Adam:
    """Adam (Kingma and Ba 2015; betas 0.9 and 0.999, epsilon 1e-8: torch's defaults) on tensors given with gradients.

    It works number by number, so every agent in a stack has an Adam of its own.
    """

    def __init__(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor], learning_rate: float):
        self._tensors, self._gradients, self._learning_rate = list(tensors), list(gradients), learning_rate
        self.means = [torch.zeros_like(tensor) for tensor in tensors]
        self.squares = [torch.zeros_like(tensor) for tensor in tensors]
        self.steps = [torch.zeros((), device=tensor.device) for tensor in tensors]

    def step(self) -> None:
        """Change the tensors in place."""
        adam(
            self._tensors, self._gradients, self.means, self.squares, [], self.steps, fused=True,
            capturable=self.steps[0].is_cuda, amsgrad=False, maximize=False, beta1=0.9, beta2=0.999, eps=1e-8,
            lr=self._learning_rate, weight_decay=0.0,
        )  # fmt: skip
