"""The published loops, written plainly: what speed is quoted against.

`causal_trace` runs one forward pass of 1 clean + `samples` corrupted rows for every (token, layer) cell, with the clean
row's state copied over the others by hooks, as rome's experiments/causal_trace.py does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


@torch.no_grad()
def causal_trace(
    hf: nn.Module,
    embedding: nn.Module,
    cells: list[list[list[nn.Module]]],
    ids: list[int],
    subject: tuple[int, int],
    noise: float,
    samples: int = 10,
) -> tuple[np.ndarray, float, float]:
    """Scores [tokens, layers], corrupted and clean probability of the clean run's answer.

    cells[token][layer]: the modules whose output at that token is restored.
    """
    first, after = subject
    batch = torch.tensor([ids] * (samples + 1), device=embedding.weight.device)
    drawn = noise * np.random.RandomState(1).randn(samples, after - first, embedding.weight.shape[1])

    def corrupt(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1:, first:after] += torch.from_numpy(drawn).to(output)
        return output

    def restore(token: int):
        def hook(module: nn.Module, args: tuple, output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            hidden[1:, token] = hidden[0, token]

        return hook

    def probabilities(modules: list[nn.Module], token: int) -> torch.Tensor:
        handles = [embedding.register_forward_hook(corrupt)]
        handles += [module.register_forward_hook(restore(token)) for module in modules]
        logits = hf(batch).logits  # [1 + samples, tokens, vocab]
        for handle in handles:
            handle.remove()
        return logits[:, -1].float().softmax(-1)

    base = probabilities([], 0)
    answer = int(base[0].argmax())
    scores = [[probabilities(m, t)[1:, answer].mean().item() for m in row] for t, row in enumerate(cells)]
    return np.array(scores), base[1:, answer].mean().item(), base[0, answer].item()
