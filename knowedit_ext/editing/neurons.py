"""Knowledge neurons (Dai et al. 2022): which neurons an answer is owed to, by integrated gradients.

Site: what the activation function reads at the prompt's last token, as in EleutherAI's port to GPT (which moved it
there from behind the activation); of gated MLPs the gate projection's output, as in EasyEdit, the up projection's
stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch

from ..checks import Below, Compat, Least, Natural, typed
from ..model.gradients import check_gradients
from ..model.head import likeliest, log_probabilities
from ..model.hooks import at_rest, learning
from ..model.load import EditableModel
from ..model.spelling import spaced
from ..model.tokens import encode, encode_part
from ..sweep.capture import clean_run, clean_runs
from ..sweep.newborn import NewbornRows, neurons_of
from .params import LayerParams
from .plots import plot_neurons
from .request import EditRequest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Part = Annotated[float, Least(0), Below(1)]


@dataclass(frozen=True)
class KNParams(LayerParams):
    """steps: points of the integral, 0 and 1 among them. adaptive_threshold: neurons above this share of the highest
    score are taken. refine: of several prompts, keep the neurons of more than the share `p`; else of any. layers: those
    that are looked at; none: all.
    """

    layers: tuple[Natural, ...] = ()
    steps: Annotated[int, Least(2), Below(2**16, "2**16")] = 20
    adaptive_threshold: Part = 0.2
    p: Part = 0.4
    refine: bool = False

    algorithms = ("KN",)
    other = frozenset({"lr_scale", "n_toks"})
    all_layers = True

    # hparams/KN/gpt2-xl.json of rome; EasyEdit's files for other models are the same.
    presets: ClassVar[dict[str, dict[str, Any]]] = {"gpt2-xl": dict(), "world": dict()}


Neuron = tuple[int, int]


@dataclass(frozen=True, eq=False)
class KnowledgeNeurons:
    """by_prompt: float32 [prompts, layers, neurons], scores for the request's prompt and then for the others; 0 where a
    layer was not looked at. coarse: by prompt, the (layer, neuron)s above the threshold. neurons: what is left of them,
    see `KNParams`. answer: what is attributed. said: the token that the model itself says behind the prompt.
    """

    by_prompt: np.ndarray
    coarse: list[list[Neuron]]
    neurons: list[Neuron]
    answer: str
    said: int

    @property
    def scores(self) -> np.ndarray:
        """[layers, neurons] for the request's own prompt."""
        return self.by_prompt[0]

    def __repr__(self) -> str:
        prompts, layers, width = self.by_prompt.shape
        size = f"{len(self.neurons)} of {layers} x {width}, {prompts} prompts"
        return f"KnowledgeNeurons(->{self.answer!r}, {size})"

    def plot(self, path: str | Path | None = None) -> Figure:
        """How many of `neurons` each layer has, and its highest score. Written as .png, .pdf or .svg."""
        return plot_neurons(self.scores, self.neurons, self.answer, path)


@dataclass(frozen=True)
class _Read:
    """Token ids of a run, and at which positions which tokens are read; their mean is attributed."""

    ids: tuple[int, ...]
    at: tuple[tuple[int, tuple[int, ...]], ...]


@at_rest
@typed
def knowledge_neurons(
    model: EditableModel,
    request: EditRequest | Mapping[str, Any],
    params: KNParams,
    prompts: Sequence[str] | None = None,
    compat: Compat = None,
) -> KnowledgeNeurons:
    """Neurons that `request.target_true` is owed to; without one, the token that the model itself says.

    prompts: others of the same fact, as they are read.

    The score of a neuron of layer l with clean value a is a / steps * sum_j dp_j / d(alpha_j a), alpha from 0 to 1,
    with layer l's neurons at alpha_j a and all else clean; of an answer of several tokens the mean over them, each
    behind those before it. compat="reference": the answer without its space, all its tokens read at the prompt's end.

    The model is left as it was. Raises ValueError for bad requests, layers, prompts, and scores that are no numbers.
    """
    request = EditRequest.of(request)
    layers = list(params.layers or range(model.num_layers))
    if layers[-1] >= model.num_layers:
        raise ValueError(f"layer {layers[-1]} is out of range: the model has layers 0..{model.num_layers - 1}")
    check_gradients(model, layers[0], model.num_layers)
    text = request.fact(target=False).text
    for number, prompt in enumerate(prompts or ()):
        if not prompt.strip():
            raise ValueError(f"prompts[{number}] is empty")
    texts = [text, *(prompts or ())]
    answer = request.target_true
    if answer is None:
        answer = model.tokenizer.decode([int(clean_run(model, encode(model, text)[0]).logits.argmax())])
    reads = [_read(model, each, answer, request, compat) for each in texts]
    with learning(model):
        scores, said = _scores(model, reads, layers, params.steps)
    if not np.isfinite(scores).all():
        raise ValueError(f"the scores of '{text}' are NaN or infinite: so are weights or activations of the model")
    coarse = [_above(each, params.adaptive_threshold) for each in scores]
    return KnowledgeNeurons(scores, coarse, _kept(coarse, params), answer, said)


def _read(model: EditableModel, text: str, answer: str, request: EditRequest, compat: str | None) -> _Read:
    ids, _ = encode(model, text)
    if compat == "reference":
        return _check(model, text, _Read(tuple(ids), ((len(ids) - 1, tuple(encode_part(model, answer.lstrip()))),)))
    answer = spaced(answer.lstrip(), text, request.space)
    joint, _ = encode(model, text + answer)
    if joint[: len(ids)] != ids or len(joint) == len(ids):
        raise ValueError(f"answer '{answer}' merges with the last token of prompt '{text}'")
    at = tuple((position - 1, (joint[position],)) for position in range(len(ids), len(joint)))
    return _check(model, text, _Read(tuple(joint[:-1]), at))


def _check(model: EditableModel, text: str, read: _Read) -> _Read:
    most = model.modules.max_positions
    if most is not None and len(read.ids) > most:
        raise ValueError(
            f"prompt '{text[:60]}...' takes {len(read.ids)} tokens, more than the model's {most} positions"
        )
    return read


def _scores(model: EditableModel, reads: Sequence[_Read], layers: Sequence[int], steps: int) -> tuple[np.ndarray, int]:
    """[prompts, layers, neurons], and the likeliest token behind the first prompt."""
    places = [(number, position) for number, read in enumerate(reads) for position, _ in read.at]
    tokens = [each for read in reads for _, each in read.at]
    wide = max(map(len, tokens))
    targets = torch.tensor([[*each, *each[:1] * (wide - len(each))] for each in tokens])  # [places, targets]
    share = torch.tensor([[1.0 / len(each)] * len(each) + [0.0] * (wide - len(each)) for each in tokens])
    rows = NewbornRows(model, clean_runs(model, [read.ids for read in reads]), places)
    alpha = torch.linspace(0, 1, steps)[:-1]  # the last point, 1, is the clean run, whatever the layer
    scores = np.zeros((len(reads), model.num_layers, max(neurons_of(model, n) for n in layers)), dtype=np.float32)
    for part in rows.jobs(layers, steps):
        born = rows.run(part, alpha)
        asked = [by_layer[n] for by_layer in (born.patched, born.moved) for n in part]
        each = lambda x: torch.cat([x, x.repeat_interleave(steps - 1, 0).repeat(len(part), 1)])  # noqa: B023, E731
        p = log_probabilities(model, born.states, each(targets)).exp()
        gradients = torch.autograd.grad((p * each(share).to(p.device)).sum(), asked)
        for layer, inner, last in zip(part, gradients, gradients[len(part) :], strict=False):
            total = inner.float().sum(1) + last.float()
            score = (born.clean[layer].float() / steps * total).cpu().numpy()  # [places, neurons]
            for number, read in enumerate(reads):
                own = [n for n, (prompt, _) in enumerate(places) if prompt == number]
                scores[number, layer, : score.shape[1]] = score[own].sum(0) / len(read.at)
    return scores, int(likeliest(model, born.states[:1].detach()))


def _above(scores: np.ndarray, threshold: float) -> list[Neuron]:
    return [(int(layer), int(neuron)) for layer, neuron in np.argwhere(scores > threshold * scores.max())]


def _kept(coarse: Sequence[Sequence[Neuron]], params: KNParams) -> list[Neuron]:
    every = sorted({neuron for each in coarse for neuron in each})
    if not params.refine:
        return every
    return [neuron for neuron in every if sum(neuron in each for each in coarse) > len(coarse) * params.p]
