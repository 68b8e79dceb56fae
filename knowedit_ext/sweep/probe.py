"""Whether a sweep gives what the model itself does: measured once for each loaded model, before its first result.

A small trace of the very kind that results are made of goes through Hugging Face's own forward, changed by hooks, and
through a sweep: a clean run, a run whose embeddings are noised and whose layer, attention and MLP outputs are taken
from the clean one at places, and prompts of other lengths that begin as the first does. What the model passes its
layers must be the same for prompts of one length.

How far rounding may part the two is measured too: copies of the plain runs are shaken by about one rounding of their
dtype in front of every layer, so a deep or touchy model gets the tolerance that it needs, and no other. (Tiny models of
all families, 4 and 40 layers, float32 to bfloat16, weights of any size: the error was at most .6 of what shaking did in
half precision, and far less in float32.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers
from torch.overrides import TorchFunctionMode

from ..model.families import UnsupportedModelError
from ..model.forward import own_forward
from ..model.head import logits
from ..model.hooks import Hooks, at_rest, named_arguments
from ..model.load import EditableModel
from .capture import clean_run, clean_runs, differing, layer_zero_input
from .interventions import Interventions, Patch
from .whole import mixes_whole

TOKENS = 13  # as many as no model has experts, neurons or heads
LONGEST_WINDOW = 64  # sliding windows up to this are overrun; longer prompts would cost too much
SLACK = 2.0
# One rounding; where it is float32: of TF32 products, and of sums over thousands of terms.
ROUNDING = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
FLOAT32_ROUNDING = 2.0**-12
NOISE = 3.0  # standard deviations of the embeddings, as tracing's
SEED = 1


def probe(model: EditableModel) -> None:
    """Raise `UnsupportedModelError` where a sweep's logits are not the model's own; nothing the second time.

    A model whose own logits or weights are not finite is left to those who read its numbers.
    """
    if not model.probed:
        model.probed = _measured(model)


@at_rest
def _measured(model: EditableModel) -> bool:
    """Whether there was something to measure."""
    ids, others = _prompts(model)
    _check_parts(model, ids, others[-1][0])
    trace = _Trace(model, len(ids))
    theirs, shaken = trace.plain(model, ids)
    for other, shared in others:
        more, more_shaken = _shaken(model, [other])[:, shared:]
        theirs, shaken = torch.cat([theirs, more]), torch.cat([shaken, more_shaken])
    finite = theirs.isfinite().all(-1)
    if not finite.any():
        return False
    try:
        ours = logits(model, trace.swept(model, ids, others)).to(theirs)
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, RuntimeError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise UnsupportedModelError(
            f"{_which(model)} cannot run in a sweep, though it runs by itself ({type(error).__name__}: {error}): its "
            "layers need something that is not known here"
        ) from error
    if not mixes_whole(model.modules):
        _check_cache(model, ids, trace.read, theirs, shaken)
    if not ours[finite].isfinite().all() and not _weights_are_finite(model):
        return False  # some bodies of attention make numbers of NaN again
    # A constant changes nothing.
    theirs, ours, shaken = (x[finite] - x[finite].mean(-1, keepdim=True) for x in (theirs, ours, shaken))
    off, moved = (ours - theirs).norm(dim=-1), (shaken - theirs).norm(dim=-1)  # [rows]
    # One row that shaking sends to another expert must not hide what parts all of them.
    if not (off.norm() <= SLACK * moved.norm() and off.median() <= SLACK * moved.median()):
        raise UnsupportedModelError(_message(model, theirs, ours, float(SLACK * moved.norm())))
    return True


def _check_cache(
    model: EditableModel, ids: Sequence[int], read: Sequence[int], theirs: torch.Tensor, shaken: torch.Tensor
) -> None:
    """A clean run says the same with a cache, which generation has, and without, as all else runs. (Layers that take
    keys from earlier ones by way of the cache have no such keys without it.)"""
    theirs, shaken = theirs[: len(read)], shaken[: len(read)]
    cached = own_forward(model, torch.tensor([list(ids)]), use_cache=True).logits[0, read].float()
    if theirs.isfinite().all() and not (cached - theirs).norm() <= SLACK * (shaken - theirs).norm():
        off = float((cached - theirs).norm() / theirs.norm())
        raise UnsupportedModelError(
            f"{_which(model)} says something else when it keeps no cache of keys and values: off by {off:.2g} of its "
            "logits' size. Without one its layers lack what they share, so numbers of it would be wrong; a newer "
            "transformers may mend that"
        )


def _weights_are_finite(model: EditableModel) -> bool:
    return all(p.is_meta or not p.is_floating_point() or bool(p.isfinite().all()) for p in model.hf.parameters())


def _prompts(model: EditableModel) -> tuple[list[int], list[tuple[list[int], int]]]:
    """A prompt of ordinary tokens, and others, with how many tokens each begins as the first does: shorter ones, and
    one as long."""
    window = getattr(model.modules.config, "sliding_window", None) or 0
    length = max(TOKENS, window + 8 if window <= LONGEST_WINDOW else 0)
    length = min(length, model.modules.max_positions or length)
    special = set(model.tokenizer.all_special_ids)
    words = min(len(model.tokenizer), int(model.modules.config.vocab_size))
    ordinary = [token for token in range(min(words, 4096)) if token not in special] or [0]
    drawn = torch.randint(len(ordinary), (2 * length,), generator=torch.Generator().manual_seed(SEED)).tolist()
    first, second = ([ordinary[n] for n in part] for part in (drawn[:length], drawn[length:]))
    third, most = length // 3, 3 * length // 4
    parts = [(third, third + length // 6 + 1), (most, most + 1), (2 * third, length)]  # tokens shared, and in all
    return first, [(first[:shared] + second[shared:end], shared) for shared, end in parts]


def _check_parts(model: EditableModel, ids: Sequence[int], others: Sequence[int]) -> None:
    """What layers are passed is the same for prompts of one length, attention weighs all it sees, and what is edited
    puts out what the MLP does."""
    modules, said = model.modules, {}
    edited = range(model.num_layers) if modules.family.down_projection else ()
    choices = _Choices(len(ids))
    with Hooks() as hooks, choices:
        for layer in range(model.num_layers):
            hooks.before(modules.attn(layer), lambda args, kwargs: choices.enter())
            hooks.behind(modules.attn(layer), lambda out: choices.leave())
        for layer in edited:
            # By themselves: what hooks of the user's make of an MLP's output is measured where it is edited.
            hooks.behind(modules.mlp(layer), partial(said.__setitem__, ("mlp", layer)), first=True)
            hooks.behind(modules.down_projection(layer), partial(said.__setitem__, ("down", layer)), first=True)
        first = clean_run(model, ids)
    for layer in edited:
        if not _same(said.get(("mlp", layer)), said.get(("down", layer))):
            raise UnsupportedModelError(
                f"{_which(model)}: what '{modules.parameter_name(layer)}' puts out is not what the MLP does, so it is "
                "no down projection that could be edited: correct its entry in FAMILIES, or leave the projection out"
            )
    if choices.among_positions:
        raise UnsupportedModelError(
            f"{_which(model)}: attention chooses among positions (torch.{choices.among_positions[0]}). Equal scores "
            "are told apart by a text's length, so what a token gives is not the same in a text that goes on"
        )
    entering = layer_zero_input(model, ids, 1)
    if entering.shape != first.hidden.shape or not _same(entering, first.hidden):
        raise UnsupportedModelError(
            f"{_which(model)} passes its layers a tensor that hangs on what layers before them do: a sweep knows what "
            "comes from the embeddings"
        )
    name = differing(first, clean_run(model, others))
    if name is not None:
        raise UnsupportedModelError(
            f"{_which(model)} passes its layers a '{name}' that hangs on the tokens: a sweep takes it from any prompt "
            "of the same length, so its numbers would be wrong"
        )


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """The same numbers, to rounding. None: of a module that never ran."""
    if one is None or other is None or one.numel() != other.numel():
        return False
    one, other = one.flatten().float(), other.flatten().float()
    return not (one - other).norm() > FLOAT32_ROUNDING * one.norm()  # NaN is left to others


class _Choices(TorchFunctionMode):
    """Sees which functions within attention modules pick some of a prompt's `length` positions."""

    PICKING = ("topk", "sort", "argsort", "kthvalue", "argmax", "argmin", "multinomial")

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.inside = length, 0
        self.among_positions: list[str] = []

    def enter(self) -> None:
        self.inside += 1

    def leave(self) -> None:
        self.inside -= 1

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(function, "__name__", "")
        if self.inside and name in self.PICKING and self.length in args[0].shape[-1:]:
            self.among_positions.append(name)
        return function(*args, **(kwargs or {}))


class _Trace:
    """A noised run of a prompt of `length` tokens, patched at places from the clean one, and where both are read."""

    def __init__(self, model: EditableModel, length: int) -> None:
        layers, last = model.num_layers, length - 1
        self.start = length // 4
        self.noised = slice(self.start, max(self.start + 1, length // 2))
        self.read = sorted({length // 2, max(0, last - 1), last})
        handed = model.modules.reads_keys(layers - 1)
        places = [
            ("layer", layers // 4, self.noised.stop - 1 if handed else self.start),
            ("mlp", layers // 2, (self.start + last) // 2),
            ("attn", (2 * layers) // 3, max(self.start, last - 1)),
        ]
        if handed:  # behind a restored state it stays the run's own
            places.append(("layer", layers - 2, self.start))
        self.places = [place for place in places if place[0] not in model.modules.family.without]

    def noisy(self, embedded: torch.Tensor) -> torch.Tensor:
        """[prompts, tokens, hidden], the first of them as it is in a clean run -> all noised alike."""
        out = embedded.clone()
        noise = torch.randn(out[0, self.noised].shape, generator=torch.Generator().manual_seed(SEED))
        out[:, self.noised] += (noise.to(out.device) * NOISE * embedded[0].float().std()).to(out.dtype)
        return out

    def plain(self, model: EditableModel, ids: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says of the clean run and of the patched one, [2 * places read, vocab], as they are and
        shaken."""
        patched = [1, 3]  # of the rows clean, patched, and these shaken

        def noise(embedded: torch.Tensor) -> torch.Tensor:
            out = embedded.clone()
            out[patched] = self.noisy(embedded)[patched]
            return out

        def restore(token: int, out: torch.Tensor) -> torch.Tensor:
            rows = out.clone()
            each = rows.view(4, len(ids), -1)
            each[patched, token] = each[[0, 2], token]
            return rows

        with Hooks() as hooks:
            hooks.behind(model.modules.embedding, noise)
            for site, layer, token in self.places:
                hooks.behind(model.modules.site(site, layer), partial(restore, token))
            said = _shaken(model, [list(ids)] * 2)
        return tuple(part[:, self.read].flatten(0, 1) for part in said.split(2))

    def swept(self, model: EditableModel, ids: Sequence[int], others: Sequence[tuple[list[int], int]]) -> torch.Tensor:
        """The states behind the final norm of the same, and at the others' own tokens."""
        length = len(ids)
        prompts = clean_runs(model, [ids, *(other for other, _ in others)])
        tree, hidden = Interventions(), [prompts[0].hidden]
        tree.add_root(length, prompt=0)
        hidden.append(layer_zero_input(model, ids, 1, self.noisy)[:, self.start :])
        noised = tree.add_root(length, prompt=0, start=self.start, parent=0 if self.start else None)
        tree.add_run(0, (), self.read)
        patches = [Patch(site, (layer,), (token,), 0) for site, layer, token in self.places]
        tree.add_run(noised, patches, self.read)
        for number, ((other, shared), prompt) in enumerate(zip(others, prompts[1:], strict=True), 1):
            root = tree.add_root(len(other), prompt=number, start=shared, parent=0 if shared else None)
            hidden.append(prompt.hidden[:, shared:])
            tree.add_run(root, (), range(shared, len(other)))
        from .engine import swept  # which is behind this check

        result = swept(model, prompts, tree, hidden)
        return torch.cat([result.hidden(run).flatten(0, 1) for run in range(len(tree.runs))])


def _shaken(model: EditableModel, ids: list[list[int]]) -> torch.Tensor:
    """[2 * prompts, tokens, vocab]: the model's own logits, and those of the same prompts shaken."""
    generator = torch.Generator().manual_seed(SEED)

    def shake(layer: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden = next(iter(named_arguments(layer, args, kwargs).values()))
        rows = hidden[len(ids) :]
        noise = torch.randn(rows.shape, generator=generator).to(rows.device)
        rows.copy_(rows * (1 + noise * ROUNDING.get(rows.dtype, FLOAT32_ROUNDING)))

    with Hooks() as hooks:
        for layer in model.modules.layers:
            hooks.before(layer, partial(shake, layer))
        return own_forward(model, torch.tensor(ids * 2), use_cache=False).logits.float()


def _which(model: EditableModel) -> str:
    family, version = model.modules.model_type, transformers.__version__
    return f"{type(model.hf).__name__} (model_type '{family}', transformers {version})"


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
    size = f"off by {float((ours - theirs).norm()) / scale:.2g} of their size, where {allowed / scale:.1g} is rounding"
    return f"{_which(model)}: the logits of a sweep are {size}; {why}. Its numbers would be wrong, so there are none"
