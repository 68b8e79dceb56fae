"""How a subject is corrupted: the published noise rules (rome, experiments/causal_trace.py:77-97) and their draws."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..checks import NotNegative, as_type, quoted, typed
from ..model.hooks import at_rest
from ..model.load import EditableModel
from ..model.tokens import encode
from ..noise_rules import read_rule

Sampler = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Noise:
    """Noise on the embeddings of the subject's tokens.

    level: factor on standard normal (or uniform(-1, 1)) draws, or a sampler: normal draws [..., hidden] float64
    to noise. replace: the noise takes the embedding's place instead of being added.
    """

    level: float | Sampler
    uniform: bool = False
    replace: bool = False

    def draw(self, generator: np.random.RandomState, samples: int, tokens: int, hidden: int) -> torch.Tensor:
        """[samples, tokens, hidden] float64, in the published order of draws."""
        shape = (samples, tokens, hidden)
        numbers = generator.uniform(-1, 1, shape) if self.uniform else generator.randn(*shape)
        drawn = torch.from_numpy(numbers)
        return _sampled(self.level, drawn) if callable(self.level) else self.level * drawn

    def corrupt(self, noise: torch.Tensor, first: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function that corrupts embeddings [samples, tokens, hidden] from token `first` on."""
        after = first + noise.shape[1]

        def apply(embedded: torch.Tensor) -> torch.Tensor:
            out = embedded.clone()
            drawn = noise.to(embedded.device)
            # float64 sum, then the model's dtype, as `x += float64` does
            out[:, first:after] = (drawn if self.replace else out[:, first:after].double() + drawn).to(out.dtype)
            return out

        return apply


def _sampled(sampler: Sampler, drawn: torch.Tensor) -> torch.Tensor:
    """What a sampler makes of draws; ValueError where that is no noise of their shape."""
    noise = sampler(drawn)
    if not isinstance(noise, torch.Tensor) or noise.shape != drawn.shape or not noise.dtype.is_floating_point:
        is_tensor = isinstance(noise, torch.Tensor)
        kind = f"{noise.dtype} {list(noise.shape)}" if is_tensor else f"a {type(noise).__name__}"
        shape = list(drawn.shape)
        raise ValueError(f"the sampler gives {kind} for draws {shape}: expected a float tensor of that shape")
    if not bool(noise.isfinite().all()):
        raise ValueError("the sampler gives NaN or infinite numbers")
    return noise


def noise_of(
    model: EditableModel,
    noise: float | str | Sampler,
    subjects: Sequence[str] | None = None,
    replace: bool = False,
    texts: Sequence[str] | None = None,
) -> Noise:
    """Resolve a number, a published rule or a sampler to `Noise`; see `noise_level`."""
    if callable(noise):
        return Noise(noise, replace=replace)
    if isinstance(noise, str):
        return Noise(noise_level(model, noise, subjects, texts), uniform=noise.startswith("u"), replace=replace)
    try:
        level = as_type("noise", noise, NotNegative)
    except ValueError as error:
        raise ValueError(f"{error}, a rule such as 's3', or a sampler") from None
    return Noise(level, replace=replace)


@at_rest
@typed
def noise_level(
    model: EditableModel, rule: str, subjects: Sequence[str] | None = None, texts: Sequence[str] | None = None
) -> float | Sampler:
    """What a published noise rule means for this model.

    rule: "s<f>": f standard deviations of the embeddings of `subjects`, each tokenised alone; "u<f>": f, for uniform
    noise in (-f, f); "m": a sampler of normal noise with mean and covariance of the embeddings of `texts` (published:
    1,000 texts of wikitext-103); "t<df>": the same with Student's t tails; a number as text: that number.

    Returns a float, or for "m" and "t" a sampler: normal draws [samples, tokens, hidden] float64 -> noise.
    """
    kind, value = read_rule(rule)
    if kind == "s":
        if not subjects:
            raise ValueError(f"noise rule {quoted(rule)} needs subjects= to take the spread of their embeddings")
        if not all(subject.strip() for subject in subjects):
            raise ValueError(f"noise rule {quoted(rule)}: a subject is empty")
        return value * _embedding_std(model, subjects)
    if kind in ("m", "t"):
        if not texts:
            raise ValueError(f"noise rule {quoted(rule)} needs texts= to take mean and covariance of their embeddings")
        gaussian = _gaussian_like(model, texts)
        return gaussian if kind == "m" else _student_like(gaussian, value)
    return value


def _embed(model: EditableModel, text: str) -> torch.Tensor:
    """Output of the embedding module for a text by itself, [tokens, hidden]."""
    ids = torch.tensor([encode(model, text)[0]], dtype=torch.int64, device=model.device)
    return model.modules.embedding(ids)[0]


def _embedding_std(model: EditableModel, subjects: Sequence[str]) -> float:
    return torch.cat([_embed(model, subject) for subject in subjects]).std().item()


def _gaussian_like(model: EditableModel, texts: Sequence[str]) -> Sampler:
    """z -> mean + z W^T with W W^T the covariance of the texts' embeddings (causal_trace.py:660-726)."""
    embedded = torch.cat([_embed(model, text).cpu().double() for text in texts])
    mean, covariance = embedded.mean(0), torch.cov(embedded.T)
    _, s, vh = torch.linalg.svd(covariance)
    weight = s.sqrt()[None, :] * vh.T

    def sample(normal: torch.Tensor) -> torch.Tensor:
        return normal @ weight.T + mean

    return sample


def _student_like(gaussian: Sampler, degrees: float) -> Sampler:
    """sqrt((df - 2) / u) times the normal noise, u from 1,000 fixed draws of chi^2[df] (causal_trace.py:729-748)."""
    if degrees <= 2:
        raise ValueError(
            f"noise rule 't{degrees:g}': Student's t has a variance only for more than 2 degrees of freedom"
        )
    factors = ((degrees - 2) / torch.from_numpy(np.random.RandomState(2).chisquare(df=degrees, size=1000))).sqrt()

    def sample(normal: torch.Tensor) -> torch.Tensor:
        noise = gaussian(normal)
        count = noise.shape[:-1].numel()
        if count > len(factors):
            raise ValueError(f"rule 't' has {len(factors)} draws, but samples x subject tokens is {count}")
        return noise * factors[:count].reshape(*noise.shape[:-1], 1)

    return sample
