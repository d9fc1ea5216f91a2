"""Bottleneck adapters read the input of the norm before the sub-block as the residual stream."""

from __future__ import annotations

import copy

import pytest
import torch

from loraplex_kernels.pool import LoraSite
from loraplex_server.model.layers.residual import ResidualStream

ATTENTION, MLP = LoraSite(3, 8, ((0, 8),)), LoraSite(5, 16, ((0, 8),))


@pytest.fixture
def model() -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({"one": torch.nn.RMSNorm(8), "two": torch.nn.RMSNorm(8)})


def test_each_sub_block_has_its_own(model: torch.nn.ModuleDict) -> None:
    stream = ResidualStream(model, {3: "one", 5: "two"})
    first, second = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    model["one"](first)
    with pytest.raises(RuntimeError, match="entry 3 was not noted"):
        stream.at(ATTENTION)
    stream.watch()
    stream.watch()
    model["one"](first)
    assert torch.equal(stream.at(ATTENTION), first[0])
    with pytest.raises(RuntimeError, match="entry 5 was not noted"):
        stream.at(MLP)
    model["two"](second)
    assert torch.equal(stream.at(MLP), second[0])
    with pytest.raises(RuntimeError, match="entry 3 was not noted"):
        stream.at(ATTENTION)


def test_a_copy_of_a_norm_that_is_given_some_rows_is_none_of_it(model: torch.nn.ModuleDict) -> None:
    plain = copy.copy(model["one"])
    stream = ResidualStream(model, {3: "one"})
    stream.watch()
    rows = torch.randn(1, 4, 8)
    model["one"](rows)
    plain(rows[0, :2])
    copy.copy(model["one"])(rows[0, :2])
    assert torch.equal(stream.at(ATTENTION), rows[0])
