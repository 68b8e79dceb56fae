"""What a run is asked to do: patches at sites of a run, in the general form."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from ..model.families import SITES

MODES = ("overwrite", "add")


@dataclass(frozen=True, eq=False)
class Patch:
    """Change a site's output at some layers and tokens while a run is computed.

    site: "layer" (the residual stream behind the layer), "attn" or "mlp" (that module's output).
    layers, tokens: every combination is patched.
    source: a root of the sweep, whose own value at the same site, layer and token is taken (`Root` numbers, as returned
        by `Interventions.add_root`), or a tensor [hidden] or [samples, hidden].
    mode: "overwrite" or "add".
    """

    site: str
    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    source: int | torch.Tensor
    mode: str = "overwrite"

    def __post_init__(self) -> None:
        if self.site not in SITES:
            raise ValueError(f"unknown site '{self.site}': expected one of {', '.join(SITES)}")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode '{self.mode}': expected one of {', '.join(MODES)}")


@dataclass(frozen=True, eq=False)
class Knockout:
    """Attention edges cut while a run is computed: at `layers` no token of `tokens` sees a position of `unseen`.

    Positions right of a token are none of its edges, and are let be (Geva et al. 2023, section 5).
    """

    layers: tuple[int, ...]
    tokens: tuple[int, ...]
    unseen: tuple[int, ...]


@dataclass(frozen=True)
class Root:
    """A whole run of one prompt, from the embeddings: the clean run, or `copies` corrupted ones.

    start: first position that differs from `parent`; what lies left of it is the parent's.
    prompt: number of the prompt, for the position embeddings.
    """

    prompt: int
    length: int
    copies: int
    start: int
    parent: int | None


@dataclass(frozen=True)
class Run:
    """A root's run, patched; one for each copy of the root. `readout`: positions whose final state is wanted."""

    root: int
    patches: tuple[Patch | Knockout, ...]
    readout: tuple[int, ...]

    @property
    def cut(self) -> dict[tuple[int, int], frozenset[int]]:
        """By layer and token the positions that the token does not see there."""
        cut: dict[tuple[int, int], frozenset[int]] = {}
        for knockout in self.patches:
            if isinstance(knockout, Knockout):
                for at in product(knockout.layers, knockout.tokens):
                    edges = frozenset(p for p in knockout.unseen if p <= at[1])
                    if edges:
                        cut[at] = cut.get(at, frozenset()) | edges
        return cut


class Interventions:
    """The roots and runs of one or many prompts, to be computed in one sweep, and the plans of it made so far.

    All but the rows that enter layer 0: the same ones serve other prompts of the same lengths.
    """

    def __init__(self) -> None:
        self.roots: list[Root] = []
        self.runs: list[Run] = []
        self.plans: dict[tuple, Any] = {}  # see `plan.plan_of`
        self._tensors: list[torch.Tensor] = []  # that are patched in

    def add_root(self, length: int, *, prompt: int, copies: int = 1, start: int = 0, parent: int | None = None) -> int:
        """A run of `length` tokens; returns the root's number."""
        if (parent is None) != (start == 0):
            raise ValueError("a root that starts behind position 0 needs a parent, one that starts at 0 has none")
        self.roots.append(Root(prompt, length, copies, start, parent))
        self.plans.clear()
        return len(self.roots) - 1

    def check_rows(self, hidden: Sequence[torch.Tensor]) -> None:
        """ValueError where `hidden` is not, by root, [copies, length - start, hidden], or patches are not so wide."""
        rows = [(root.copies, root.length - root.start) for root in self.roots]
        if rows != [tuple(x.shape[:-1]) for x in hidden]:
            raise ValueError(f"rows enter layer 0 for {[list(x.shape[:-1]) for x in hidden]}: expected {rows}")
        for source in self._tensors:
            if source.shape[-1] != hidden[0].shape[-1]:
                raise ValueError(_of_width(source, hidden[0].shape[-1]))

    def add_run(self, root: int, patches: Iterable[Patch | Knockout], readout: Iterable[int]) -> int:
        """Returns the run's number. Raises ValueError for roots, tokens and sources that do not fit."""
        run = Run(root, tuple(patches), tuple(readout))
        if not 0 <= root < len(self.roots):
            raise ValueError(f"no root {root}: there are {len(self.roots)} so far")
        length = self.roots[root].length
        for token in (*run.readout, *(token for patch in run.patches for token in patch.tokens)):
            if not 0 <= token < length:
                raise ValueError(f"no token {token}: the run has tokens 0..{length - 1}")
        if not run.readout:
            raise ValueError("a run needs a position to read out")
        for patch in run.patches:
            if isinstance(patch, Patch):
                self._check_source(patch, self.roots[root])
        for (layer, token), unseen in run.cut.items():
            if min(unseen) < 0 or len(unseen) > token:
                raise ValueError(
                    f"token {token} would see nothing at layer {layer}: leave it one of the positions 0..{token}"
                    if min(unseen) >= 0
                    else f"no position {min(unseen)}: the run has positions 0..{length - 1}"
                )
        self.runs.append(run)
        self.plans.clear()
        return len(self.runs) - 1

    def _check_source(self, patch: Patch, root: Root) -> None:
        source = patch.source
        if isinstance(source, torch.Tensor):
            if source.dim() not in (1, 2):
                raise ValueError(_of_width(source, "hidden"))
            self._tensors.append(source)
            copies = 1 if source.dim() == 1 else source.shape[0]
            what = "tensor"
        else:
            if not 0 <= source < len(self.roots):
                raise ValueError(f"no root {source}: there are {len(self.roots)} so far")
            length, copies = self.roots[source].length, self.roots[source].copies
            if any(token >= length for token in patch.tokens):
                raise ValueError(
                    f"no token {max(patch.tokens)} in the patch's source, root {source} of {length} tokens"
                )
            what = f"source, root {source},"
        if copies not in (1, root.copies):
            raise ValueError(f"a patch's {what} has {copies} rows: expected 1 or the run's {root.copies} samples")


def _of_width(source: torch.Tensor, width: int | str) -> str:
    return f"a patch's tensor is {list(source.shape)}: expected [{width}] or [samples, {width}]"
