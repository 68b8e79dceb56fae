"""Random trees of runs against the plain hook loop: the sweep is exact, whatever is patched."""

from __future__ import annotations

import logging
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knowedit_ext.model.load import EditableModel
from knowedit_ext.sweep import CleanRun, Interventions, Knockout, Patch, SweepResult, clean_run, layer_zero_input, sweep
from knowedit_ext.sweep.layout import lay_out
from knowedit_ext.sweep.plan import split_runs
from knowedit_ext.sweep.segments import Planner

from ..support.families import LAYERS, VOCAB, WIDTH, WINDOWED, tiny_model
from ..support.more_families import DENSE, known, more_model
from ..support.oracle import Cut, Plain, PlainRoot, Write, added, normal

FAMILIES = ("gpt2", "gptj", "llama", "mistral", *known({"gemma4": {}}))  # the last hands keys on
SITES = ("layer", "attn", "mlp")


@cache
def model_of(family: str) -> EditableModel:
    return more_model(family, scale=4.0) if family in DENSE else tiny_model(family)


class Tree:
    """The same runs twice: as the sweep is asked for them, and for the oracle."""

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self.prompts: list[CleanRun] = []
        self.asked = Interventions()
        self.hidden: list[torch.Tensor] = []
        self.roots: list[PlainRoot] = []
        self.runs: list[tuple[PlainRoot, list[Write]]] = []

    def __repr__(self) -> str:
        roots = [(r.prompt, r.length, r.copies, r.start) for r in self.asked.roots]
        return f"Tree(roots (prompt, length, copies, start): {roots}, runs: {self.asked.runs})"

    def add_root(self, hidden: torch.Tensor, prompt: int, start: int = 0, parent: int | None = None) -> int:
        copies, rows, _ = hidden.shape
        self.hidden.append(hidden)
        return self.asked.add_root(start + rows, prompt=prompt, copies=copies, start=start, parent=parent)

    def sweep(self, max_rows: int | None = None) -> SweepResult:
        return sweep(self.model, self.prompts, self.asked, self.hidden, max_rows)

    def want(self) -> list[torch.Tensor]:
        plain, states = Plain(self.model.hf), []
        for root in self.roots:
            plain.record(root)
        for root, writes in self.runs:
            states += plain.runs([(root, writes)])
        return states

    def check(self, max_rows: int | None = None) -> SweepResult:
        got = self.sweep(max_rows)
        for number, want in enumerate(self.want()):
            torch.testing.assert_close(
                got.hidden(number), want[:, list(self.asked.runs[number].readout)], atol=1e-5, rtol=1e-5
            )
        return got


def add_prompt(tree: Tree, ids: list[int], branches: list[tuple[int, int, bool]]) -> list[int]:
    """A clean root, and for every (start, copies, whole) a corrupted one, as a branch or whole; their numbers."""
    number, model = len(tree.prompts), tree.model
    tree.prompts.append(clean_run(model, ids))
    clean = tree.add_root(tree.prompts[-1].hidden, number)
    tree.roots.append(PlainRoot(ids))
    roots = [clean]
    for seed, (start, copies, whole) in enumerate(branches):
        change = added(normal(seed, copies, min(2, len(ids) - start), WIDTH), start)
        hidden = layer_zero_input(model, ids, copies, change)
        if whole or start == 0:
            roots.append(tree.add_root(hidden, number))
        else:
            roots.append(tree.add_root(hidden[:, start:], number, start, clean))
        tree.roots.append(PlainRoot(ids, copies, change))
    return roots


def add_run(tree: Tree, root: int, patches: list[Patch | Knockout], readout: list[int]) -> None:
    tree.asked.add_run(root, patches, readout)
    plain = lambda source: tree.roots[source] if isinstance(source, int) else source  # noqa: E731
    writes = [
        Cut(layer, token, p.unseen)
        if isinstance(p, Knockout)
        else Write(p.site, layer, token, plain(p.source), p.mode == "add")
        for p in patches
        for layer in p.layers
        for token in p.tokens
    ]
    tree.runs.append((tree.roots[root], writes))


def knockouts(family: str, length: int) -> st.SearchStrategy[Knockout]:
    """Of any tokens and positions; each keeps sight of position 0 and, in sliding windows, of itself."""
    tokens = st.lists(st.integers(0, length - 1), min_size=1, max_size=3, unique=True).map(tuple)
    unseen = st.lists(st.integers(1, max(1, length - 1)), min_size=1, max_size=4, unique=True).map(tuple)
    drawn = st.builds(
        Knockout,
        layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=3, unique=True).map(tuple),
        tokens=tokens,
        unseen=unseen,
    )
    return drawn.filter(lambda k: family not in (*WINDOWED, "gemma4") or not {*k.tokens} & {*k.unseen})


@st.composite
def trees(draw, family: str) -> Tree:
    tree = Tree(model_of(family))
    tensors = [normal(n, 1, 1, WIDTH)[0, 0].float() for n in range(2)]
    for _ in range(draw(st.integers(1, 3))):
        length = draw(st.integers(2, 8))
        ids = draw(st.lists(st.integers(2, VOCAB - 1), min_size=length, max_size=length))
        copies = draw(st.integers(1, 3))
        branches = draw(
            st.lists(st.tuples(st.integers(0, length - 1), st.just(copies), st.booleans()), min_size=0, max_size=2)
        )
        roots = add_prompt(tree, ids, branches)
        tokens = st.lists(st.integers(0, length - 1), min_size=1, max_size=3)
        given_tensors = [*tensors, normal(copies, copies, 1, WIDTH)[:, 0].float()]
        patch = lambda sources: st.builds(  # noqa: E731
            Patch,
            site=st.sampled_from(SITES),
            layers=st.lists(st.integers(0, LAYERS - 1), min_size=1, max_size=3).map(tuple),  # noqa: B023
            tokens=tokens.map(tuple),  # noqa: B023
            source=st.sampled_from(sources),
            mode=st.sampled_from(["overwrite", "overwrite", "add"]),
        )
        # Patches that several runs have in common make them share rows, then fork.
        shared = st.one_of(patch([roots[0], *tensors]), knockouts(family, length))
        common = draw(st.lists(shared, min_size=1, max_size=3))
        for _ in range(draw(st.integers(1, 6))):
            root = draw(st.sampled_from(roots))
            sources = [*tensors, *(r for r in roots if tree.roots[r].copies in (1, tree.roots[root].copies))]
            sources += [t for t in given_tensors[2:] if len(t) == tree.roots[root].copies]
            own = draw(st.lists(st.one_of(patch(sources), knockouts(family, length)), min_size=0, max_size=3))
            add_run(tree, root, draw(st.sampled_from([own, common + own, own + common[:1]])), draw(tokens))
    return tree


def row_layers_of_oracle(tree: Tree) -> int:
    """Rows that the plain loop computes: all rows of all roots and runs, in every layer."""
    return LAYERS * sum(len(root.ids) * root.copies for root in [*tree.roots, *(root for root, _ in tree.runs)])


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_the_plain_loop(family: str, caplog) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(trees(family))
    def check(tree: Tree) -> None:
        whole = tree.check()
        assert whole.sweeps == 1 and whole.row_layers <= row_layers_of_oracle(tree)
        for max_rows in (1, 40):
            parts = tree.sweep(max_rows)
            for number in range(len(tree.runs)):
                torch.testing.assert_close(parts.hidden(number), whole.hidden(number), atol=5e-6, rtol=5e-6)

    with caplog.at_level(logging.ERROR, "knowedit_ext"):
        check()


def test_runs_that_fork_behind_a_common_patch() -> None:
    """The rows born by the common patch are born twice, each with the patch."""
    for mode in ("overwrite", "add"):
        tree, tensor = Tree(tiny_model("gpt2")), torch.ones(WIDTH)
        clean, noisy = add_prompt(tree, [3, 4, 5, 6, 7], [(1, 2, False)])
        common = Patch("layer", (1,), (2,), tensor, mode)
        for patches in ([], [Patch("mlp", (2,), (3,), clean)], [Patch("attn", (2,), (2,), tensor, "add")]):
            add_run(tree, noisy, [common, *patches], [4])
        tree.check()


def test_branches_of_branches() -> None:
    """A root may branch from one that branches itself; a chunk that needs the last needs them all."""
    tree, ids = Tree(tiny_model("llama")), [3, 4, 5, 6, 7, 8]
    clean, noisy = add_prompt(tree, ids, [(1, 2, False)])
    first, second = tree.roots[noisy].change, added(normal(7, 2, 1, WIDTH), 3)
    both = lambda x: second(first(x))  # noqa: E731
    hidden = layer_zero_input(tree.model, ids, 2, both)
    tip = tree.add_root(hidden[:, 3:], 0, 3, noisy)
    tree.roots.append(PlainRoot(ids, 2, both))
    add_run(tree, tip, [], [5])
    for token in (1, 4):
        add_run(tree, tip, [Patch("mlp", (1, 2), (token,), noisy)], [5, 1])
        add_run(tree, tip, [Patch("attn", (0,), (token,), clean, "add")], [5])
    for max_rows in (None, 1):
        tree.check(max_rows)


def test_many_prompts_at_once() -> None:
    """Prompts of different lengths, the longer ones not first; each with its own positions."""
    for family in FAMILIES:
        tree = Tree(model_of(family))
        for length in (3, 9, 2, 6):
            ids = list(range(length + 2, 2, -1))
            clean, noisy = add_prompt(tree, ids, [(1, 2, False)])
            for token in range(1, length):
                add_run(tree, noisy, [Patch("layer", (1,), (token,), clean)], [length - 1, 0])
        tree.check()


# -- rows that are not computed ----------------------------------------------------------------------------------------


def planned(tree: Tree):
    return lay_out(Planner(tree.asked.roots, range(len(tree.asked.roots)), LAYERS).plan(tree.asked.runs), LAYERS)


@pytest.mark.parametrize("start", [0, 2])
def test_row_layers_of_a_state_map(start: int) -> None:
    """samples x T(T+1)/2 x L(L-1)/2, and the unpatched runs; in the last layer only rows that are read out."""
    tree, length, samples = Tree(tiny_model("gpt2")), 7, 3
    clean, noisy = add_prompt(tree, list(range(3, 3 + length)), [(start, samples, False)])
    for token in range(start, length):
        for layer in range(LAYERS):
            add_run(tree, noisy, [Patch("layer", (layer,), (token,), clean)], [length - 1])
    layout, rest = planned(tree), length - start
    root_rows = length + samples * rest
    most = samples * rest * (rest + 1) // 2 * LAYERS * (LAYERS - 1) // 2
    assert layout.root_rows == root_rows
    assert layout.row_layers <= most + LAYERS * root_rows
    # Below the last layer exactly the definition: a run born behind layer l has rows in layers l + 1 .. L - 1.
    for layer in range(LAYERS - 1):
        assert layout.rows[layer] == root_rows + layer * samples * rest * (rest + 1) // 2
    # In it, the runs born there bring the patched row and the one that is read out, no other.
    assert layout.rows[-2] - layout.rows[-3] == samples * (2 * (rest - 1) + 1)
    assert tree.check().row_layers == layout.row_layers


def test_patches_that_change_nothing_cost_nothing() -> None:
    tree = Tree(tiny_model("llama"))
    clean, noisy = add_prompt(tree, [3, 4, 5, 6, 7], [(2, 3, False)])
    for site in SITES:
        add_run(tree, noisy, [Patch(site, (0, 1, 2, 3), (0, 1), clean)], [4])  # left of the noise
        add_run(tree, noisy, [Patch(site, (0, 1), (3,), noisy)], [4])  # its own values
    add_run(tree, noisy, [Patch("layer", (LAYERS - 1,), (2, 3), clean)], [4])  # behind the last layer, not read
    layout = planned(tree)
    assert layout.rows == [5 + 3 * 3] * (LAYERS + 1)
    tree.check()


def test_equal_runs_share_their_rows() -> None:
    tree = Tree(tiny_model("gpt2"))
    clean, noisy = add_prompt(tree, [3, 4, 5, 6], [(1, 2, False)])
    for _ in range(3):
        add_run(tree, noisy, [Patch("layer", (0,), (1,), clean)], [3])
    once = Tree(tree.model)
    clean, noisy = add_prompt(once, [3, 4, 5, 6], [(1, 2, False)])
    add_run(once, noisy, [Patch("layer", (0,), (1,), clean)], [3])
    assert planned(tree).rows == planned(once).rows
    got = tree.check()
    assert torch.equal(got.hidden(0), got.hidden(2))


def test_a_pure_readout_computes_the_roots_alone() -> None:
    tree = Tree(tiny_model("mistral"))
    add_prompt(tree, [3, 4, 5, 6], [])
    add_run(tree, 0, [], [0, 3, 3])
    got = tree.check()
    assert got.row_layers == 4 * LAYERS and got.hidden(0).shape == (1, 3, WIDTH)
    logits = tree.model.modules.head(got.hidden(0)[0, -1])
    torch.testing.assert_close(logits, tree.prompts[0].logits, atol=1e-5, rtol=1e-5)


# -- chunks ------------------------------------------------------------------------------------------------------------


def state_map(samples: int = 2, length: int = 6) -> Tree:
    tree = Tree(tiny_model("gpt2"))
    clean, noisy = add_prompt(tree, list(range(3, 3 + length)), [(1, samples, False)])
    for token in range(1, length):
        for layer in range(LAYERS):
            add_run(tree, noisy, [Patch("layer", (layer,), (token,), clean)], [length - 1])
    return tree


@pytest.mark.parametrize("max_rows", [30, 50, 100, 10_000])
def test_max_rows_is_kept(max_rows: int) -> None:
    tree = state_map()
    got = tree.check(max_rows)
    assert got.rows <= max_rows
    assert (got.sweeps > 1) == (max_rows < 130)


def test_too_small_a_max_rows_is_reported(caplog) -> None:
    got = state_map().check(3)
    assert got.sweeps == 20 and "max_rows=3, but one patched run" in caplog.text
    assert len(caplog.records) == 1


def test_every_run_is_in_one_chunk_in_order() -> None:
    tree = state_map()
    chunks = [runs for runs, _ in split_runs(tree.asked, 40)]
    assert [run for chunk in chunks for run in chunk] == tree.asked.runs
    assert all(chunks) and len(chunks) > 3


# -- bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "patch, message",
    [
        (dict(layers=(LAYERS,)), r"patch at layer 4: the model has layers 0\.\.3"),
        (dict(layers=(-1,)), "patch at layer -1"),
        (dict(tokens=(5,)), r"no token 5: the run has tokens 0\.\.4"),
        (dict(tokens=(-1,)), "no token -1"),
        (dict(source=4), "no root 4: there are 4"),
        (dict(source=-1), "no root -1"),
        (dict(source=3, tokens=(4,)), "no token 4 in the patch's source, root 3 of 2 tokens"),
        (dict(source=2), "root 2, has 2 rows: expected 1 or the run's 3 samples"),
        (dict(source=torch.zeros(2, WIDTH)), "tensor has 2 rows: expected 1 or the run's 3 samples"),
        (dict(source=torch.zeros(WIDTH + 1)), r"tensor is \[33\]: expected \[32\]"),
        (dict(source=torch.zeros(1, 1, WIDTH)), r"tensor is \[1, 1, 32\]"),
        (dict(site="head"), "unknown site 'head'"),
        (dict(mode="times"), "unknown mode 'times'"),
    ],
)
def test_bad_patches(patch, message) -> None:
    tree = Tree(tiny_model("gpt2"))
    clean, noisy, _ = add_prompt(tree, [3, 4, 5, 6, 7], [(2, 3, False), (2, 2, False)])
    add_prompt(tree, [3, 4], [])
    with pytest.raises(ValueError, match=message):
        good = dict(site="mlp", layers=(1,), tokens=(3,), source=clean)
        tree.asked.add_run(noisy, [Patch(**(good | patch))], [4])
        tree.sweep()


def test_bad_roots_and_readouts() -> None:
    tree = Tree(tiny_model("gpt2"))
    add_prompt(tree, [3, 4, 5], [])
    with pytest.raises(ValueError, match="needs a parent"):
        tree.asked.add_root(3, prompt=0, start=1)
    with pytest.raises(ValueError, match="no root 7: there are 1"):
        tree.asked.add_run(7, [], [2])
    with pytest.raises(ValueError, match="no token 3: the run has tokens 0..2"):
        tree.asked.add_run(0, [], [0, 3])
    with pytest.raises(ValueError, match="position to read out"):
        tree.asked.add_run(0, [], [])
    with pytest.raises(ValueError, match="no runs"):
        tree.sweep()
    with pytest.raises(ValueError, match="max_rows is -1"):
        tree.asked.add_run(0, [], [0])
        tree.sweep(-1)


def test_the_callers_tensors_are_left_alone() -> None:
    tree = state_map()
    given_tensor = torch.ones(WIDTH)
    add_run(tree, 1, [Patch("layer", (0, 2), (2,), given_tensor, "add")], [5])
    before = [x.clone() for x in tree.hidden]
    tree.check()
    assert torch.equal(given_tensor, torch.ones(WIDTH))
    assert all(torch.equal(a, b) for a, b in zip(before, tree.hidden, strict=True))


def test_two_sweeps_are_bit_equal() -> None:
    tree = state_map()
    first, second = (tree.sweep(60).states for _ in range(2))
    assert torch.equal(first, second) and np.isfinite(first.numpy()).all()
