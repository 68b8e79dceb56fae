"""What part a token plays in a prompt, as the papers' figures group them."""

from __future__ import annotations

import numpy as np

ROLES = (
    "First subject token",
    "Middle subject tokens",
    "Last subject token",
    "First subsequent token",
    "Further tokens",
    "Last token",
)


def by_role(effect: np.ndarray, subject_range: tuple[int, int]) -> dict[str, np.ndarray]:
    """effect [tokens, layers] -> [tokens of that role, layers] by role; as published, a token may have two roles."""
    first, after = subject_range
    last = after - 1
    end = len(effect) - 1
    parts = (
        effect[first : first + 1],
        effect[first + 1 : last],
        effect[last : last + 1],
        effect[after : after + 1],  # empty where the subject ends the prompt
        effect[after + 1 : end],
        effect[end : end + 1],
    )
    return dict(zip(ROLES, parts, strict=True))
