"""Sparse CSR patterns, as `torch.sparse.sampled_addmm` takes them."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

with warnings.catch_warnings():
    # torch warns once per process that CSR tensors are in beta; users cannot act on it.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([0.0]), size=(1, 1))


def csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    """Row i stores `values` at ``columns[starts[i] : starts[i + 1]]``, which need not be sorted."""
    return torch.sparse_csr_tensor(starts, columns, values, size=size, check_invariants=False)
