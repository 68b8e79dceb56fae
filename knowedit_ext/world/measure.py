"""Does the model know the world, and where? Held-out accuracy, and indirect effects by the published loop.

The loop runs one forward pass per cell through hooks. ``knowedit_ext.trace`` gives the same numbers sooner; this one
needs nothing but the model, so that a freshly trained world can be judged on its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROLES = ("first subject", "middle subject", "last subject", "first subsequent", "further", "last")


@torch.no_grad()
def answer_probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, statements: list[dict], batch: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """For known_1000 records: is the likeliest next token the attribute's first one, and how probable is that one.

    Returns:
        ``right`` bool [statements] and ``probability`` float32 [statements].
    """
    prompts = [tokenizer(s["prompt"]).input_ids for s in statements]
    answers = [tokenizer(" " + s["attribute"]).input_ids[0] for s in statements]
    right, probability = np.zeros(len(prompts), bool), np.zeros(len(prompts), np.float32)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    at = 0
    while at < len(by_length):  # only prompts of one length share a batch: no padding
        length = len(prompts[by_length[at]])
        group = [i for i in by_length[at : at + batch] if len(prompts[i]) == length]
        at += len(group)
        ids = torch.tensor([prompts[i] for i in group])  # [group, length]
        logits = model(ids, logits_to_keep=1).logits[:, -1].float()  # [group, vocab]
        wanted = torch.tensor([answers[i] for i in group])
        right[group] = (logits.argmax(-1) == wanted).numpy()
        probability[group] = logits.softmax(-1).gather(1, wanted[:, None])[:, 0].numpy()
    return right, probability


@torch.no_grad()
def subject_noise(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, subjects: Iterable[str], factor: float = 3.0
) -> float:
    """``factor`` times the standard deviation of the subjects' token embeddings (the published ``s3`` rule)."""
    embedding = model.get_input_embeddings()
    return factor * torch.cat([embedding(torch.tensor(tokenizer(s).input_ids)) for s in subjects]).std().item()


def subject_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, subject: str) -> tuple[int, int]:
    """First token of the subject in the prompt and the one after its last."""
    start = prompt.find(subject)
    if start < 0:
        raise ValueError(f"subject {subject!r} does not occur in prompt {prompt!r}")
    offsets = tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    inside = [i for i, (a, b) in enumerate(offsets) if a < start + len(subject) and b > start]
    return inside[0], inside[-1] + 1


def _roles(tokens: int, first: int, end: int) -> dict[int, str]:
    roles = {t: "further" for t in range(end, tokens)}
    roles.update({t: "middle subject" for t in range(first, end)})
    roles[end] = "first subsequent"
    roles[first] = "first subject"
    roles[end - 1] = "last subject"
    roles[tokens - 1] = "last"
    return roles


@torch.no_grad()
def trace_states(
    model: PreTrainedModel, ids: list[int], subject: tuple[int, int], noise: float, samples: int = 10
) -> tuple[np.ndarray, float, float]:
    """Scores [tokens, layers] of restoring one layer output, and the probabilities without noise and without repair."""
    layers = model.transformer.h
    rows = torch.tensor([ids]).repeat(samples + 1, 1)  # row 0 stays clean
    first, end = subject
    draw = np.random.RandomState(1).randn(samples, end - first, model.config.n_embd) * noise

    def corrupt(_module, _inputs, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1:, first:end] += torch.from_numpy(draw).to(output.dtype)
        return output

    def run(layer: int | None = None, token: int = 0) -> torch.Tensor:
        def restore(_module, _inputs, output):
            states = output[0] if isinstance(output, tuple) else output
            states[1:, token] = states[0, token]

        hooks = [model.transformer.wte.register_forward_hook(corrupt)]
        if layer is not None:
            hooks.append(layers[layer].register_forward_hook(restore))
        try:
            return model(rows, logits_to_keep=1).logits[:, -1].float().softmax(-1)  # [samples + 1, vocab]
        finally:
            for hook in hooks:
                hook.remove()

    base = run()
    answer = int(base[0].argmax())
    cells = [[run(layer, token)[1:, answer].mean().item() for layer in range(len(layers))] for token in range(len(ids))]
    return np.array(cells), base[0, answer].item(), base[1:, answer].mean().item()


def indirect_effects(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: list[dict], noise: float, samples: int = 10
) -> tuple[dict[str, np.ndarray], float, float]:
    """Average indirect effect by token role, float64 [layers] each, and the mean clean and corrupted probabilities."""
    effects: dict[str, list[np.ndarray]] = defaultdict(list)
    clean, corrupted = [], []
    for fact in tqdm(facts, desc="tracing", unit="fact"):
        ids = tokenizer(fact["prompt"]).input_ids
        subject = subject_tokens(tokenizer, fact["prompt"], fact["subject"])
        scores, high, low = trace_states(model, ids, subject, noise, samples)
        for token, role in _roles(len(ids), *subject).items():
            effects[role].append(scores[token] - low)
        clean.append(high)
        corrupted.append(low)
    return {r: np.mean(effects[r], 0) for r in ROLES if r in effects}, float(np.mean(clean)), float(np.mean(corrupted))
