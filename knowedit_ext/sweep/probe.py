"""Whether a sweep gives what the model itself does: measured once for each loaded model, before its first result.

Two prompts that differ in their last token go through Hugging Face's own forward, and through the layers as a tree,
with the tree attention and our reading of the head. How far rounding may part the two is measured too: copies of the
rows ride along that are shaken by about one rounding of their dtype in front of every layer, so a deep or touchy model
gets the tolerance that it needs, and no other. (Tiny models of all families, 4 and 40 layers, float32 to bfloat16,
weights of any size: the error was at most .6 of what shaking did in half precision, and far less in float32.)
"""

from __future__ import annotations

import torch
import transformers

from ..model.families import UnsupportedModelError
from ..model.head import final_states, logits
from ..model.hooks import at_rest
from ..model.load import EditableModel
from .attention import tree_attention_in
from .capture import CleanRun, RowArguments, clean_run
from .interventions import Interventions
from .layer import run_layer
from .layout import lay_out
from .segments import Planner

TOKENS = 24
LONGEST_WINDOW = 64  # sliding windows up to this are overrun; longer prompts would cost too much
SLACK = 2.0
# One rounding; where it is float32: of TF32 products, and of sums over thousands of terms.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FLOAT32_ROUNDING = 2.0**-12
SEED = 1


def probe(model: EditableModel) -> None:
    """Raise `UnsupportedModelError` where a sweep's logits are not the model's own; nothing the second time.

    A model whose own logits are not finite is left to those who read them.
    """
    if not model.probed:
        model.probed = _measured(model)


@at_rest
def _measured(model: EditableModel) -> bool:
    """Whether there was something to measure."""
    first, second = (clean_run(model, ids) for ids in _prompts(model))
    theirs = torch.stack([first.logits, second.logits])
    if not torch.isfinite(theirs).all():
        return False
    shaken, ours = logits(model, _swept(model, first, second)).to(theirs).view(2, *theirs.shape)
    theirs, ours, shaken = (x - x.mean(-1, keepdim=True) for x in (theirs, ours, shaken))  # a constant changes nothing
    allowed = SLACK * float(min((shaken - ours).norm(), (shaken - theirs).norm()))
    if not (ours - theirs).norm() <= allowed:
        raise UnsupportedModelError(_message(model, theirs, ours, allowed))
    return True


def _prompts(model: EditableModel) -> tuple[list[int], list[int]]:
    """Two prompts of ordinary tokens that differ in the last one."""
    window = getattr(model.modules.config, "sliding_window", None) or 0
    length = max(TOKENS, window + 8 if window <= LONGEST_WINDOW else 0)
    length = min(length, model.modules.max_positions or length)
    special = set(model.tokenizer.all_special_ids)
    words = min(len(model.tokenizer), int(model.modules.config.vocab_size))
    ordinary = [token for token in range(min(words, 4096)) if token not in special] or [0]
    drawn = torch.randint(len(ordinary), (length,), generator=torch.Generator().manual_seed(SEED)).tolist()
    ids = [ordinary[n] for n in drawn]
    return ids, [*ids[:-1], ordinary[(drawn[-1] + 1) % len(ordinary)]]


def _swept(model: EditableModel, first: CleanRun, second: CleanRun) -> torch.Tensor:
    """[4, hidden] behind the final norm at the last tokens of the shaken copies, and at the prompts' own.

    The second prompt is a row that branches from the first: what looks at the row before its own does not go unseen,
    nor does what counts rows instead of positions: the prompts come behind their copies.
    """
    length = len(first.ids)
    tree = Interventions()
    for copy in (0, 2):
        tree.add_root(length, prompt=0)
        tree.add_root(length, prompt=1, start=length - 1, parent=copy)
    layout = lay_out(Planner(tree.roots, range(4), model.num_layers).plan([]), model.num_layers)
    arguments = RowArguments([first, second], layout.prompt * length + layout.position)
    hidden = torch.cat([first.hidden[0], second.hidden[0, -1:]] * 2)
    half = len(hidden) // 2
    generator = torch.Generator().manual_seed(SEED)
    with tree_attention_in(model.modules):
        for number in range(model.num_layers):
            noise = torch.randn(half, hidden.shape[-1], generator=generator).to(hidden.device)
            factors = 1 + noise * ROUNDING.get(hidden.dtype, FLOAT32_ROUNDING)
            hidden = torch.cat([(hidden[:half] * factors).to(hidden.dtype), hidden[half:]])
            hidden, _ = run_layer(model.modules, number, hidden, arguments, layout.segments[number])
    return final_states(model, hidden[[length - 1, length, half + length - 1, half + length]])


def _message(model: EditableModel, theirs: torch.Tensor, ours: torch.Tensor, allowed: float) -> str:
    scale = float(theirs.norm())
    factor = float((ours * theirs).sum() / (ours * ours).sum())
    if (factor * ours - theirs).norm() <= allowed:
        why = f"they are the model's but for a factor of {factor:.4g}, so its head scales them in a way not known here"
    else:
        attention = model.modules.attn(0)
        why = f"{type(attention).__name__}, a layer or the head does something that is not known here"
        own = attention.config._attn_implementation if hasattr(attention, "config") else "eager"
        if own != "eager":
            why += f", or '{own}' leaves something out, which attn_implementation=\"eager\" would not"
    family, version = model.modules.model_type, transformers.__version__
    which = f"{type(model.hf).__name__} (model_type '{family}', transformers {version})"
    size = f"off by {float((ours - theirs).norm()) / scale:.2g} of their size, where {allowed / scale:.1g} is rounding"
    return f"{which}: the logits of a sweep are {size}; {why}. Its numbers would be wrong, so there are none"
