"""Whether what a down projection puts out is what its layer adds to the residual stream: measured, in each layer asked.

MEMIT and its kin spread a residual of a layer's output and have the down projection put it out; that is right only
where the layer adds it as it is. Granite multiplies it first, post-norm layers (Gemma2, OLMo2) normalise it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..model.hooks import Hooks, at_rest
from ..model.load import EditableModel
from ..sweep.capture import clean_runs
from ..sweep.packed import PackedPrompts

TOKENS = 4
SEED = 1
# Of what was added, the most that may not arrive: rounding of the sums in between, of about the size of their terms.
ROUNDING = {torch.bfloat16: 2.0**-4, torch.float16: 2.0**-7}
FLOAT32_ROUNDING = 2.0**-10


@at_rest
def check_adds_to_residual(model: EditableModel, layers: Sequence[int]) -> None:
    """Raise ValueError unless a vector added to the down projection's output at a token is what the layer's changes by.

    Measured in each of `layers`, which are in range, on a few tokens.
    """
    packed = PackedPrompts(model, clean_runs(model, [list(range(min(TOKENS, model.modules.max_positions or TOKENS)))]))
    generator = torch.Generator().manual_seed(SEED)
    for layer in layers:
        plain = packed.run(packed.start, layer, layer + 1)  # any rows will do
        last = plain[-1].double()
        if not torch.isfinite(last).all():
            raise ValueError(f"layer {layer} puts out NaN or infinite numbers")
        given = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(last.device)
        given = (given * last.norm() / given.norm()).to(plain.dtype)
        with Hooks() as hooks:
            hooks.behind(model.modules.down_projection(layer), lambda out, given=given: _added(out, given))
            arrived = packed.run(packed.start, layer, layer + 1)[-1].double() - last
        given = given.double()
        factor = float(arrived @ given / (given @ given))
        allowed = ROUNDING.get(plain.dtype, FLOAT32_ROUNDING) * float(given.norm())
        if (arrived - given).norm() <= allowed:
            continue
        if (arrived - factor * given).norm() <= allowed:
            why = f"multiplies the MLP's output by {factor:.3g} before adding it, so"
        else:
            why = "normalises the MLP's output (or changes it otherwise) before adding it, so"
        raise ValueError(
            f"MEMIT is not defined for '{model.modules.model_type}': its layer {layer} {why} the residual that MEMIT "
            "(and what is built on it) spreads is not the down projection's; ROME works"
        )


def _added(out: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """The output [..., hidden] with `given` [hidden] added to its last row."""
    changed = out.clone()
    changed.view(-1, out.shape[-1])[-1] += given.to(out.device, out.dtype)
    return changed
