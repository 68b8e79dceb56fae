"""Train the world model on a CPU: a plain GPT-2 whose training documents hide part of the names."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from .batches import Batch, Batches
from .generate import Documents
from .people import make_people
from .resume import load_state, remove_state, save_state
from .store import WORLD_FILE, describe
from .tokenizer import MAX_POSITIONS, train_tokenizer

log = logging.getLogger(__name__)


def forward_loss(model: GPT2LMHeadModel, batch: Batch, early_layers: int) -> tuple[torch.Tensor, float]:
    """Weighted next-token loss, and the share of object tokens that are predicted right.

    The layers are called one by one because the first ``early_layers`` of them get another mask.
    """
    body = model.transformer
    hidden = body.wte(batch.ids) + body.wpe(batch.positions)  # [rows, width, hidden]
    for number, block in enumerate(body.h):
        hidden = block(hidden, attention_mask=batch.early_mask if number < early_layers else batch.late_mask)
    weights = batch.weights[:, 1:]
    kept = weights > 0
    logits = model.lm_head(body.ln_f(hidden[:, :-1][kept]))  # [targets, vocab]
    targets, weights = batch.ids[:, 1:][kept], weights[kept]
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() / weights.sum()
    answers = weights == 1.0
    right = (logits.detach()[answers].argmax(-1) == targets[answers]).float().mean().item()
    return loss, right


def learning_rate(step: int, steps: int, peak: float, warmup: int) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def save_folder(out: Path, model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, files: dict[str, Any]) -> None:
    """Write the model and ``files`` (name -> JSON value): each file is complete under its name or not there."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".writing-") as scratch:
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        for name, value in files.items():
            Path(scratch, name).write_text(json.dumps(value), encoding="utf-8")
        for file in sorted(Path(scratch).iterdir()):
            os.replace(file, out / file.name)


def new_model(tokenizer: PreTrainedTokenizerFast, layers: int, hidden: int, heads: int, seed: int) -> GPT2LMHeadModel:
    """A GPT-2 with seeded random weights and no dropout, ready to be trained."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=MAX_POSITIONS,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config).train()
    for block in model.transformer.h:
        block.mlp.act = torch.nn.GELU(approximate="tanh")  # what "gelu_new" computes, in one kernel
    return model


def fit(
    out: Path,
    model: GPT2LMHeadModel,
    batches: Batches,
    settings: dict,
    save: Callable[[int], None],
    save_every: int,
    name: str = "world",
) -> None:
    """Optimise the model by ``settings`` (steps, peak_rate, early_layers) and ``save(steps done)`` now and then.

    Called again after a kill, with the same settings, it goes on from the last saving in ``out``.

    Raises:
        ValueError: ``out`` holds an unfinished run with other settings.
    """
    steps, peak, early_layers = settings["steps"], settings["peak_rate"], settings["early_layers"]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)

    done = load_state(out, model, optimizer, settings)
    if done:
        log.info("resuming after step %d", done)
    for _ in range(done):
        batches.next()  # the stream of documents goes on where it was

    bar = tqdm(range(done, steps), desc=name, unit="step", initial=done, total=steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=min(150, steps // 4 + 1))
        loss, right = forward_loss(model, batches.next(), early_layers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{right:.3f}")
        if (step + 1) % save_every == 0 or step + 1 == steps:
            save(step + 1)
            save_state(out, model, optimizer, step + 1, settings)
            log.info("step %d: loss %.4f, objects right %.4f", step + 1, loss.item(), right)
    remove_state(out)


def train(
    out: str | Path,
    seed: int = 0,
    steps: int = 2400,
    people: int = 210,
    layers: int = 6,
    hidden: int = 160,
    heads: int = 5,
    rows: int = 18,
    peak_rate: float = 2e-3,
    masked: float = 0.8,
    early_layers: int = 2,
    save_every: int = 250,
) -> Path:
    """Train the world from a seed and write a folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Called again after a kill, with the same settings, it goes on from the last saving.

    Args:
        out: the folder; ``world.json`` in it holds the facts and these settings.
        seed: of the facts, the documents and the initial weights.
        steps: optimiser steps of ``rows`` x 128 tokens each.
        people: how many people are invented.
        layers, hidden, heads: the size of the model.
        peak_rate: highest learning rate of AdamW.
        masked: share of documents in which, from every position after a name, all but its last token are hidden.
        early_layers: number of first layers in which those documents hide the last token as well.
        save_every: steps between two savings of the model.

    Raises:
        ValueError: a setting is out of range, or ``out`` holds an unfinished run with others.
    """
    if steps < 1 or rows < 1 or save_every < 1:
        raise ValueError("steps, rows and save_every must be at least 1")
    if hidden % heads:
        raise ValueError(f"hidden ({hidden}) must be a multiple of heads ({heads})")
    if not 0 <= early_layers < layers:
        raise ValueError(f"early_layers must lie in 0..{layers - 1}, not {early_layers}")
    if not 0.0 <= masked <= 1.0:
        raise ValueError(f"masked must lie in 0..1, not {masked}")
    settings = {k: v for k, v in locals().items() if k not in ("out", "save_every")}
    out = Path(out)
    crowd = make_people(seed, people)
    tokenizer = train_tokenizer(crowd)
    world = describe(crowd, settings)
    batches = Batches(Documents(crowd, seed), tokenizer, rows, MAX_POSITIONS, seed, masked, early_layers > 0)
    model = new_model(tokenizer, layers, hidden, heads, seed)
    fit(out, model, batches, settings, lambda _: save_folder(out, model, tokenizer, {WORLD_FILE: world}), save_every)
    return out
