"""Patched runs the plain way: the model's own forward pass over whole prompts, changed by hooks.

Knows nothing of segments, packed rows or the package's attention. Runs of one prompt are the rows of one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

# Where the families keep them; of names that a layer has more than one of, the first.
SITE_NAMES = {
    "attn": (
        "attn",
        "attention",
        "self_attn",
        "self_attention",
        "linear_attn",
        "conv",
        "mixer",
        "mamba",
        "temporal_block",
    ),
    "mlp": ("mlp.dense_4h_to_h", "mlp", "feed_forward", "block_sparse_moe", "fc2", "ffn.down_proj", "mlp_block"),
}
Site = tuple[str, int]  # ("layer" | "attn" | "mlp", layer)
Change = Callable[[torch.Tensor], torch.Tensor]  # embeddings [copies, tokens, hidden] -> the same


def _inside(block: nn.Module, name: str) -> nn.Module | None:
    for part in name.split("."):
        block = getattr(block, part, None)
    return block


@dataclass
class Write:
    """Overwrite (or add to) one token of one site; source: a recorded root or a tensor [hidden] / [copies, hidden]."""

    site: str
    layer: int
    token: int
    source: PlainRoot | torch.Tensor
    add: bool = False


@dataclass
class Cut:
    """In one layer, a token does not see some positions: its line of the attention mask says so."""

    layer: int
    token: int
    unseen: Sequence[int]


@dataclass
class PlainRoot:
    """`copies` runs of `ids` whose embeddings `change` has changed; `sites` and `final` as they came out."""

    ids: Sequence[int]
    copies: int = 1
    change: Change | None = None
    sites: dict[Site, torch.Tensor] = field(default_factory=dict)  # [copies, tokens, hidden]
    final: torch.Tensor | None = None  # [copies, tokens, hidden] entering the head


class Plain:
    """A Hugging Face decoder run with hooks."""

    def __init__(self, hf: nn.Module) -> None:
        self.hf = hf
        count = hf.config.get_text_config().num_hidden_layers
        self.layers = next(m for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == count)

    def has(self, site: str, layer: int) -> bool:
        return site == "layer" or any(_inside(self.layers[layer], name) is not None for name in SITE_NAMES[site])

    def module(self, site: str, layer: int) -> nn.Module:
        block = self.layers[layer]
        if site == "layer":
            return block
        return next(module for name in SITE_NAMES[site] if (module := _inside(block, name)) is not None)

    @torch.no_grad()
    def record(self, root: PlainRoot) -> PlainRoot:
        """Run a root, keeping every site's output."""

        def keep(site: Site) -> Callable[[torch.Tensor], None]:
            return lambda x: root.sites.__setitem__(site, x.clone())

        every = [(site, n) for n in range(len(self.layers)) for site in ("layer", *SITE_NAMES) if self.has(site, n)]
        root.final = self._forward([root], {site: keep(site) for site in every})
        return root

    @torch.no_grad()
    def runs(self, runs: Sequence[tuple[PlainRoot, Sequence[Write | Cut]]]) -> list[torch.Tensor]:
        """Final states [copies, tokens, hidden] of patched runs; roots must all have the same number of tokens."""
        writes: dict[Site, list[tuple[slice, Write]]] = {}
        cuts: dict[int, list[tuple[slice, Cut]]] = {}
        first, rows = 0, []
        for root, patches in runs:
            rows.append(slice(first, first + root.copies))
            first += root.copies
            for write in patches:
                if isinstance(write, Cut):
                    cuts.setdefault(write.layer, []).append((rows[-1], write))
                else:
                    writes.setdefault((write.site, write.layer), []).append((rows[-1], write))

        def patch(site: Site) -> Callable[[torch.Tensor], None]:
            def change(x: torch.Tensor) -> None:
                for at, write in writes[site]:
                    value = write.source
                    if isinstance(value, PlainRoot):
                        value = value.sites[site][:, write.token]
                    x[at, write.token] = (x[at, write.token] if write.add else 0) + value.to(x.dtype)

            return change

        def blind(layer: int):
            def change(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                mask = kwargs["attention_mask"].expand(sum(root.copies for root, _ in runs), -1, -1, -1).clone()
                for at, cut in cuts[layer]:
                    mask[at, :, cut.token, list(cut.unseen)] = torch.finfo(mask.dtype).min
                return args, kwargs | {"attention_mask": mask}

            return change

        with ExitStack() as stack:
            for layer in cuts:
                attention = self.module("attn", layer)
                handle = attention.register_forward_pre_hook(blind(layer), with_kwargs=True)
                stack.callback(handle.remove)
            if cuts:  # only this one is always handed a mask
                stack.enter_context(eager(self.hf))
            final = self._forward([root for root, _ in runs], {site: patch(site) for site in writes})
        return [final[at] for at in rows]

    def _forward(self, roots: Sequence[PlainRoot], sites: dict[Site, Callable[[torch.Tensor], None]]) -> torch.Tensor:
        entering: list[torch.Tensor] = []

        def embed(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            parts = output.split([root.copies for root in roots])
            return torch.cat([r.change(x) if r.change else x for r, x in zip(roots, parts, strict=True)])

        def on_output(act: Callable[[torch.Tensor], None]):
            def hook(module: nn.Module, args: tuple, output) -> None:
                out = output[0] if isinstance(output, tuple) else output
                act(out.view(len(ids), -1, out.shape[-1]) if out.dim() == 2 else out)

            return hook

        ids = torch.cat([torch.tensor([list(root.ids)] * root.copies) for root in roots])
        with ExitStack() as stack:
            handles = [self.hf.get_input_embeddings().register_forward_hook(embed)]
            handles += [self.module(*site).register_forward_hook(on_output(act)) for site, act in sites.items()]
            head = self.hf.get_output_embeddings()
            handles.append(head.register_forward_pre_hook(lambda module, args: entering.append(args[0])))
            for handle in handles:
                stack.callback(handle.remove)
            self.hf(ids, use_cache=False)
        return entering[0].clone()

    @torch.no_grad()
    def log_probabilities(self, final: torch.Tensor) -> torch.Tensor:
        """[..., vocab] in float64: the model's own forward, with these states in front of its head."""
        rows = final.reshape(-1, 1, final.shape[-1])
        handle = self.hf.get_output_embeddings().register_forward_pre_hook(lambda module, args: (rows,))
        try:
            logits = self.hf(torch.zeros(len(rows), 1, dtype=torch.int64), use_cache=False).logits
        finally:
            handle.remove()
        return logits.double().log_softmax(-1).view(*final.shape[:-1], -1)


@contextmanager
def eager(hf: nn.Module) -> Iterator[None]:
    before = hf.config._attn_implementation
    hf.set_attn_implementation("eager")
    try:
        yield
    finally:
        hf.set_attn_implementation(before)


def added(noise: torch.Tensor, first: int, replace: bool = False) -> Change:
    """noise [copies, subject tokens, hidden] float64 on the embeddings from token `first` on."""

    def change(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        at = slice(first, first + noise.shape[1])
        x[:, at] = (noise if replace else x[:, at].double() + noise).to(x.dtype)
        return x

    return change


def normal(seed: int, samples: int, tokens: int, hidden: int) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).randn(samples, tokens, hidden))


@dataclass
class PlainTrace:
    samples: np.ndarray  # [samples, tokens, layers] log-probability of the whole answer
    low: np.ndarray  # [samples]
    high: float

    @property
    def scores(self) -> np.ndarray:
        return np.exp(self.samples).mean(0)


def plain_trace(
    hf: nn.Module,
    ids: Sequence[int],
    corrupted: PlainRoot,
    answer: Sequence[int],
    kind: str = "state",
    window: int = 1,
    sever: str | None = None,
    frozen: PlainRoot | None = None,
) -> PlainTrace:
    """Causal tracing by definition. `corrupted` runs over ids + answer[:-1]; `frozen` gives the severed outputs."""
    plain, length = Plain(hf), len(ids)
    layers = len(plain.layers)
    clean = plain.record(PlainRoot(corrupted.ids))
    corrupted = plain.record(corrupted)
    frozen = corrupted if frozen is None else plain.record(frozen)
    runs = []
    for token in range(length):
        for layer in range(layers):
            if kind == "state":
                writes = [Write("layer", layer, token, clean)]
            else:
                low, high = layer - window // 2, layer + (window + 1) // 2
                writes = [Write(kind, at, token, clean) for at in range(max(0, low), min(layers, high))]
            if sever:
                writes += [Write(sever, at, token, frozen) for at in range(layers)]
            runs.append((corrupted, writes))

    def score(final: torch.Tensor) -> np.ndarray:  # [copies, tokens, hidden] -> [copies]
        logp = plain.log_probabilities(final[:, length - 1 :])
        return sum(logp[:, n, token] for n, token in enumerate(answer)).numpy()

    cells = np.stack([score(final) for final in plain.runs(runs)])  # [tokens * layers, samples]
    return PlainTrace(
        cells.reshape(length, layers, -1).transpose(2, 0, 1), score(corrupted.final), float(score(clean.final)[0])
    )


def plain_knockout(
    hf: nn.Module, ids: Sequence[int], answer: Sequence[int], unseen: Sequence[int], window: int
) -> np.ndarray:
    """[layers] log-probabilities of the answer where the tokens that predict it do not see some positions."""
    plain, length = Plain(hf), len(ids)
    root, layers = PlainRoot([*ids, *answer[:-1]]), len(plain.layers)
    asking = range(length - 1, len(root.ids))
    runs = []
    for layer in range(layers):
        inside = range(max(0, layer - window // 2), min(layers, layer + (window + 1) // 2))
        cuts = [Cut(at, token, [p for p in unseen if p <= token]) for at in inside for token in asking]
        runs.append((root, cuts))
    logp = [plain.log_probabilities(final[0, length - 1 :]) for final in plain.runs(runs)]
    return np.array([sum(float(each[n, token]) for n, token in enumerate(answer)) for each in logp])
