"""What a layer adds to the residual stream of what its down projection puts out: measured, in each layer asked.

MEMIT and its kin spread a residual r of a layer's output over the layers, and the down projection's output m has to
change so that r arrives. Most layers add m as it is: it changes by r. Granite adds c m: by r / c. Post-norm layers
(Gemma 2, Gemma 3, OLMo 2) add norm(m) = w m / rms(m), whatever the length of m: what can arrive lies on an ellipsoid.
Of it the point nearest to y = norm(m) + r is taken, and of all m' that the norm sends there the one nearest to m:

    minimise |w u - y|^2 with mean(u^2) = 1:   u = w y / (w^2 + l), l the root of mean(u^2) = 1 above -min w^2
    m' = s u,   s = mean(u m), but at least rms(m) / 2

Where y can be reached (mean((y / w)^2) = 1) l is 0 and r arrives whole. What does not arrive is part of the residual
that the next layers are given, each of which is run with those below it changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..model.hooks import Hooks, at_rest
from ..model.load import EditableModel
from ..sweep.capture import clean_runs
from ..sweep.packed import PackedPrompts

TOKENS = 4
SEED = 1
HALVINGS = 200  # of the interval that l lies in: to float64's last digit
# Of what was added, the most that may not arrive: rounding of the sums in between, of about the size of their terms.
ROUNDING = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
FLOAT32_ROUNDING = 2.0**-10


@dataclass(frozen=True)
class Adding:
    """A layer adds factor * m, or factor * weight * m / rms(m), where its down projection puts out m.

    weight: float64 [hidden], of the norm behind the MLP; None: there is none.
    """

    factor: float
    weight: torch.Tensor | None = None

    def change(self, put_out: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """By how much m [n, hidden] is to change, so that what is added changes by `wanted` [n, hidden]; float64."""
        wanted = wanted.double() / self.factor
        if self.weight is None:
            return wanted
        m, w = put_out.double(), self.weight.to(put_out.device)
        length = m.square().mean(-1, keepdim=True).sqrt()
        u = nearest(w, w * m / length + wanted)
        return torch.maximum((u * m).mean(-1, keepdim=True), length / 2) * u - m


def nearest(weight: torch.Tensor, aim: torch.Tensor) -> torch.Tensor:
    """Of all u [n, hidden] with mean(u^2) = 1 the one for which weight * u is nearest to `aim` [n, hidden]; float64."""
    squares, pull = weight.square(), weight * aim
    low = -squares.min().expand(len(aim), 1).clone()
    high = pull.square().mean(-1, keepdim=True).sqrt()
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        long = (pull / (squares + middle)).square().mean(-1, keepdim=True) > 1
        low, high = torch.where(long, middle, low), torch.where(long, high, middle)
    u = pull / (squares + high)
    return u / u.square().mean(-1, keepdim=True).sqrt()


@at_rest
def measure_adding(model: EditableModel, layers: Sequence[int]) -> dict[int, Adding]:
    """Of each of `layers`, which are in range, what becomes of a vector added to the down projection's output.

    Raises ValueError where that is nothing that `Adding` says.
    """
    packed = PackedPrompts(model, clean_runs(model, [list(range(min(TOKENS, model.modules.max_positions or TOKENS)))]))
    generator = torch.Generator().manual_seed(SEED)
    return {layer: _measured(model, packed, layer, generator) for layer in layers}


def _measured(model: EditableModel, packed: PackedPrompts, layer: int, generator: torch.Generator) -> Adding:
    modules, outputs = model.modules, []
    norm = modules.mlp_norm(layer)

    def run(given: torch.Tensor | None) -> torch.Tensor:
        with Hooks() as hooks:
            if given is not None:
                hooks.behind(modules.down_projection(layer), lambda out: _added(out, given))
            hooks.behind(modules.down_projection(layer), lambda out: outputs.append(out.reshape(-1, out.shape[-1])[-1]))
            return packed.run(packed.could_enter(layer), layer, layer + 1)[-1]  # any rows will do

    plain = run(None)
    last = plain.double()
    if not torch.isfinite(last).all():
        raise ValueError(f"layer {layer} puts out NaN or infinite numbers")
    given = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(last.device)
    given = (given * last.norm() / given.norm()).to(plain.dtype)
    arrived, allowed = run(given).double() - last, ROUNDING.get(plain.dtype, FLOAT32_ROUNDING)
    weight, sent = None, given.double()
    if norm is not None:
        before, after = (norm(m[None])[0].double() for m in outputs)
        sent, weight = after - before, norm(torch.ones_like(outputs[0])[None])[0].double()
        m = outputs[1].double()
        if not (weight * m / m.square().mean().sqrt() - after).norm() <= allowed * after.norm():
            raise ValueError(
                _message(model, layer, "normalises the MLP's output otherwise than by its root mean square")
            )
        allowed *= float(last.norm() / sent.norm().clamp_min(1e-300))  # of sums with the stream
    factor = float(arrived @ sent / (sent @ sent))
    if not (arrived - factor * sent).norm() <= allowed * sent.norm() or not abs(factor) > allowed:
        why = "normalises the MLP's output (or changes it otherwise) before adding it"
        raise ValueError(_message(model, layer, why))
    return Adding(1.0 if abs(factor - 1.0) <= allowed else factor, weight)


def _message(model: EditableModel, layer: int, why: str) -> str:
    return (
        f"MEMIT is not defined for '{model.modules.model_type}': its layer {layer} {why}, so the residual that MEMIT "
        "(and what is built on it) spreads is not the down projection's; ROME works"
    )


def _added(out: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The output [..., hidden] with `given` [hidden] added to its last row."""
    changed = out.clone()
    changed.view(-1, out.shape[-1])[-1] += given.to(out.device, out.dtype)
    return changed
