"""Paged ragged attention in plain torch: any device, and the fast path on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from loraplex_kernels.attention.batch import AttentionBatch
from loraplex_kernels.attention.groups import QueryGroup

MAX_SCORES = 1 << 22
"""Scores (16 MiB in float32) of a slice of queries, about, where soft-capped logits are written out."""


def write_kv(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, batch: AttentionBatch) -> None:
    """Copy the step's keys and values [T, Hkv, D] to their cells."""
    write_rows(k, v, kv_cache, batch.cells(kv_cache.shape[2]))


def write_rows(k: torch.Tensor, v: torch.Tensor, kv_cache: torch.Tensor, cells: torch.Tensor) -> None:
    """Copy keys and values [T, Hkv, D] to `cells` [T * Hkv], as `AttentionBatch.cells` numbers them."""
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    keys = kv_cache.view(-1, head_dim)
    values = keys[num_kv_heads * block_size :]
    for table, rows in ((keys, k), (values, v)):
        new = rows.reshape(-1, head_dim)
        if table.dtype.itemsize > 1:
            table.index_copy_(0, cells, new.to(table.dtype))
        else:
            # torch indexes no narrow floats, but it does bytes.
            limit = torch.finfo(table.dtype).max
            narrow = new.clamp(-limit, limit).to(table.dtype)
            table.view(torch.uint8).index_copy_(0, cells, narrow.view(torch.uint8))


def paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of the step's queries [T, Hq, D] over their cached keys and values."""
    q = q.contiguous()
    groups = batch.groups(sliding_window)
    in_place = q.device.type == "cpu" and q.dtype == kv_cache.dtype == torch.float32
    out: torch.Tensor | None = None
    for group in groups:
        if group.row_start is None:
            queries = q.index_select(0, group.rows)
        else:
            queries = q.narrow(0, group.row_start, len(group.rows))
        if in_place and group.query_len == 1:
            result = _decode_in_place(queries, kv_cache, group, scale, softcap)
        else:
            keys, values = _keys_values(kv_cache, group, k, v)
            result = _dense(queries, keys.to(q.dtype), values.to(q.dtype), group, scale, softcap)
        if len(groups) == 1 and group.row_start is not None:
            return result
        if group.unpad is not None:
            result = result.index_select(0, group.unpad)
        if out is None:
            out = torch.empty_like(q)
        if group.row_start is None:
            out.index_copy_(0, group.valid_rows, result)
        else:
            out.narrow(0, group.row_start, len(group.rows)).copy_(result)
    return torch.empty_like(q) if out is None else out


def _decode_in_place(
    q: torch.Tensor, kv_cache: torch.Tensor, group: QueryGroup, scale: float, softcap: float | None
) -> torch.Tensor:
    """One query per piece [n, Hq, D], reading keys and values where they lie: no gathered copy.

    Scores are a product of queries and cache sampled at the visible cells; the output is a weighted bag of
    cache rows. Both kernels walk the cells of one query head after another.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, block_size = kv_cache.shape[2:4]
    keys = kv_cache.view(-1, head_dim)
    values = keys[num_kv_heads * block_size :]
    index = group.sparse_index(num_heads, num_kv_heads, len(keys), masked=softcap is None)
    shape = (group.num_pieces, num_heads, group.key_len)
    flat_q = q.reshape(-1, head_dim)
    alpha = scale if softcap is None else scale / softcap
    scores = torch.sparse.sampled_addmm(index.pattern, flat_q, keys.t(), alpha=alpha).values().view(shape)
    if softcap is not None:
        scores = scores.tanh_().mul_(softcap)
        bias = group.bias(torch.float32)
        if bias is not None:
            scores += bias[:, 0]
    weights = torch.softmax(scores, dim=-1).view(-1)
    return torch.embedding_bag(values, index.cells, index.offsets, False, 0, False, weights)[0].view(q.shape)


def _keys_values(
    kv_cache: torch.Tensor, group: QueryGroup, k: torch.Tensor | None, v: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The group's keys and values, each [n, Hkv, key_len, D]."""
    num_kv_heads, block_size, head_dim = kv_cache.shape[2:]
    shape = (group.num_pieces, num_kv_heads, group.key_len, head_dim)
    if group.fresh and k is not None and v is not None and k.dtype == v.dtype == kv_cache.dtype:
        # The rows just computed are the very bits that the cache holds.
        own = [
            tensor.index_select(0, group.rows)
            if group.row_start is None
            else tensor.narrow(0, group.row_start, len(group.rows))
            for tensor in (k, v)
        ]
        keys, values = (
            tensor.reshape(shape[0], shape[2], num_kv_heads, head_dim).transpose(1, 2) for tensor in own
        )
        return keys, values
    table = kv_cache.view(-1, head_dim)
    cells = group.cells(num_kv_heads).view(-1)
    keys = table.index_select(0, cells)
    values = table[num_kv_heads * block_size :].index_select(0, cells)
    return keys.view(shape), values.view(shape)


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: QueryGroup,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Padded attention of a group: q [n * query_len, Hq, D], k and v [n, Hkv, key_len, D]."""
    n, queries = group.num_pieces, group.query_len
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    if softcap is not None:
        return _softcapped(q, k, v, group, scale, softcap)
    bias = group.bias(q.dtype)
    if queries == 1:
        # The query heads that share a key head stand in for queries, so that nothing is repeated.
        grouped = q.view(n, num_kv_heads, num_heads // num_kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v, attn_mask=bias, scale=scale).reshape(q.shape)
    per_head = q.view(n, queries, num_heads, head_dim).transpose(1, 2)
    if bias is not None and q.is_cuda and num_heads != num_kv_heads:
        # CUDA's fused kernels take a mask or shared key heads, not both; the other one holds all scores.
        k, v = (tensor.repeat_interleave(num_heads // num_kv_heads, dim=1) for tensor in (k, v))
        num_kv_heads = num_heads
    out = F.scaled_dot_product_attention(
        per_head,
        k,
        v,
        attn_mask=bias,
        is_causal=group.fresh,
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out.transpose(1, 2).reshape(q.shape)


def _softcapped(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: QueryGroup, scale: float, softcap: float
) -> torch.Tensor:
    """As `_dense`, with logits softcap * tanh(logit / softcap); k and v [n, Hkv, key_len, D]."""
    n, queries, keys = group.num_pieces, group.query_len, group.key_len
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    per_kv_head = num_heads // num_kv_heads
    k, v = k.float().unsqueeze(2), v.float().unsqueeze(2)
    per_head = q.view(n, queries, num_kv_heads, per_kv_head, head_dim).permute(0, 2, 3, 1, 4).float()
    bias = group.bias(torch.float32)
    step = max(1, MAX_SCORES // (n * num_heads * keys))
    parts = []
    for begin in range(0, queries, step):
        end = min(begin + step, queries)
        seen = end if group.fresh else keys
        scores = torch.matmul(per_head[..., begin:end, :], k[..., :seen, :].mT).mul_(scale / softcap)
        scores = scores.tanh_().mul_(softcap)
        if group.fresh:
            scores += torch.full((end - begin, seen), -torch.inf, device=q.device).triu_(begin + 1)
        elif bias is not None:
            scores += bias[:, :, None, begin:end]
        parts.append(torch.matmul(torch.softmax(scores, dim=-1), v[..., :seen, :]))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)
    return out.permute(0, 3, 1, 2, 4).reshape(q.shape).to(q.dtype)
