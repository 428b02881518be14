"""AdamW (Loshchilov and Hutter 2019) that keeps 6 bytes a parameter beside a bf16 weight, where
fp32 master weights and moments are 12.

* Weight: exact fp32, in two halves. The model's bf16 weight is the fp32 value rounded to nearest
  (halves away from zero), the ``remainder`` (int16) what rounding took away, so that bits(fp32) =
  bits(bf16) * 2^16 + remainder. No update is lost.
* First moment: bf16, rounded to nearest. It forgets its past within 1 / (1 - beta1) steps, and
  rounding errors with it.
* Second moment: bf16, rounded stochastically. A step moves it by 1 - beta2 of its value or less, a
  tenth of bf16's spacing at 0.999: rounded to nearest it would stand still. Stochastic rounding is
  right on average (Gupta et al. 2015); over the last 1 / (1 - beta2) steps its noise averages to a
  few percent of the moment, half that of its root.

The noise is a hash of (step, parameter, element): the same on any data-parallel layout, and again
in a resumed run. Each step's update is computed in fp32 from the moments before they are rounded.
One Triton kernel a parameter: 12 bytes read, 8 written.
"""

from __future__ import annotations

import functools

import torch

from training.errors import InvariantError

MASK = 0xFFFFFFFF


def split_(values: torch.Tensor, weight: torch.Tensor, remainder: torch.Tensor) -> None:
    """Store fp32 ``values`` as bf16 ``weight`` and int16 ``remainder``."""
    bits = values.view(torch.int32)
    low = bits << 16 >> 16  # the lower half with its sign
    weight.view(torch.int16).copy_((bits - low) >> 16)
    remainder.copy_(low)


def joined(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 values that ``split_`` stored."""
    return ((weight.view(torch.int16).int() << 16) + remainder).view(torch.float32)


def mixed(number: int) -> int:
    """A hash of 32 bits (Wellons' lowbias32)."""
    number &= MASK
    number = ((number ^ number >> 16) * 0x7FEB352D) & MASK
    number = ((number ^ number >> 15) * 0x846CA68B) & MASK
    return number ^ number >> 16


def round_stochastically(values: torch.Tensor, seed: int, first: int) -> torch.Tensor:
    """fp32 ``values`` >= 0 as bf16, up with the probability that makes the mean right; element i
    draws from (seed, first + i)."""
    place = torch.arange(first, first + values.numel(), device=values.device) & MASK
    noise = place ^ seed
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        noise = ((noise ^ noise >> shift) * factor) & MASK
    noise = (noise ^ noise >> 16) & 0xFFFF
    return ((values.view(torch.int32) + noise.int()) >> 16).to(torch.int16).view(torch.bfloat16)


class SplitAdamW(torch.optim.AdamW):
    """AdamW over flat bf16 parameters, whose gradients are in ``decoupled_grad`` (fp32 or bf16).

    ``factor`` (one fp32 number, on the parameters' device) multiplies all gradients. ``place``, an
    attribute of each parameter, is (number of the whole parameter, index in it of the first element
    here).
    """

    factor: torch.Tensor | None = None

    def initialise(self) -> None:
        """Make the state of parameters that have none: about to train, or to be loaded into."""
        for parameter in (parameter for group in self.param_groups for parameter in group["params"]):
            if parameter not in self.state:
                if parameter.dtype != torch.bfloat16:
                    raise InvariantError(f'a trained parameter is {parameter.dtype}: set optimizer_precision = "fp32"')
                self.state[parameter] = {
                    "remainder": torch.zeros_like(parameter, dtype=torch.int16),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }

    @torch.no_grad()
    def step(self, closure=None) -> None:
        if closure is not None:
            raise InvariantError("this AdamW takes no closure")
        self.initialise()
        for group in self.param_groups:
            step = group["step"] = group.get("step", 0) + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                number, first = parameter.place
                update = _on_gpu if parameter.is_cuda else update_
                update(
                    parameter,
                    state["remainder"],
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    parameter.decoupled_grad,
                    self.factor,
                    group["lr"] / (1 - beta1**step),
                    beta1,
                    beta2,
                    group["eps"],
                    1 - group["lr"] * group["weight_decay"],
                    (1 - beta2**step) ** -0.5,
                    mixed(mixed(step) + number),
                    first,
                )


def update_(
    weight, remainder, exp_avg, exp_avg_sq, grad, factor, rate, beta1, beta2, eps, keep, root, seed, first
) -> None:
    """One step of one parameter, in place, in plain torch. ``rate``: the learning rate over 1 -
    beta1^t; ``keep``: 1 - lr x decay; ``root``: 1 / sqrt(1 - beta2^t)."""
    gradient = grad.float() * factor
    first_moment = exp_avg.float() * beta1 + gradient * (1 - beta1)
    second_moment = exp_avg_sq.float() * beta2 + gradient * gradient * (1 - beta2)
    values = joined(weight, remainder) * keep - rate * first_moment / (second_moment.sqrt() * root + eps)
    split_(values, weight, remainder)
    exp_avg.copy_(first_moment)
    exp_avg_sq.copy_(round_stochastically(second_moment, seed, first))


def _on_gpu(
    weight, remainder, exp_avg, exp_avg_sq, grad, factor, rate, beta1, beta2, eps, keep, root, seed, first
) -> None:
    """``update_`` as one Triton kernel."""
    count, block = weight.numel(), 1024
    # A seed of 32 bits without its sign would be another type to Triton, and another kernel.
    seed -= (seed >> 31) << 32
    _kernel()[(-(-count // block),)](
        weight.view(torch.int16),
        remainder,
        exp_avg,
        exp_avg_sq.view(torch.int16),
        grad,
        factor,
        count,
        rate,
        beta1,
        beta2,
        1 - beta1,
        1 - beta2,
        eps,
        keep,
        root,
        seed,
        (first & MASK) - (first >> 31 & 1) * 2**32,
        block,
    )


@functools.cache
def _kernel():
    from training.optim.adamw_triton import update

    return update
