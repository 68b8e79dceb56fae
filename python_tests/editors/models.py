"""Editors that change something: random networks, with statistics of random rows."""

from __future__ import annotations

import torch

import knowedit_ext as ke

REQUESTS = [
    ke.EditRequest("w5 {} w9 w10", "w3 w7", "w20 w23", "w31 w32"),
    ke.EditRequest("{} w9", "w33", "w22"),
    ke.EditRequest("w4 w6 {} w8", "w12", "w24 w25 w26"),
]


def mend_editor(model: ke.EditableModel, layers=(1, 3)) -> ke.MEND:
    editor = ke.MEND.new(model, layers, rank=5, seed=2)
    generator = torch.Generator().manual_seed(3)
    draw = lambda x, scale: x.copy_(scale * torch.randn(x.shape, generator=generator))  # noqa: E731
    with torch.no_grad():
        for key, transform in editor.network.mend.items():
            for layer in transform.mlp["layers"]:
                for part in (layer.u, layer.bias, layer.mode_shift.weight):
                    draw(part, 0.1)
                layer.mode_scale.weight.add_(torch.rand(layer.mode_scale.weight.shape, generator=generator))
            d_in, d_out = transform.widths
            transform.observe(
                torch.randn(9, d_in, generator=generator), 0.1 * torch.randn(9, d_out, generator=generator)
            )
            assert key == f"({d_in}, {d_out})"
        editor.network.edit_lrs.copy_(1e-3 * torch.arange(1.0, len(editor.weights) + 1))
    return editor


def efk_editor(model: ke.EditableModel, layers=(1, 3)) -> ke.EFK:
    return ke.EFK.new(model, layers, seed=2, hidden=6, condition=7)
