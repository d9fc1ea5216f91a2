"""transformers + PEFT as a contender: the same requests by the usual means, as fast as those go.

The loop is a plain greedy one on a KV cache, without what `generate` does around each step, in inference
mode; only the last position's logits are computed. Prompts of one length are batched without a mask. Needs
transformers and peft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache

from loraplex_bench.peers.jobs import Answered, BenchModel, Job

# How PEFT calls a row of a batch that no adapter applies to.
_BASE_ROW = "__base__"


class PeftPeer:
    """A base model with all adapters attached.

    Args:
        weights: "dense", or "bnb-nf4" for bitsandbytes' NF4.
        dtype: of the activations, and of dense weights.
    """

    def __init__(
        self,
        model: BenchModel,
        weights: str,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._device = device
        kwargs: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
        if weights == "bnb-nf4":
            kwargs["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        if weights == "dense" and device == "cpu":
            del kwargs["device_map"]
        base = AutoModelForCausalLM.from_pretrained(model.base, **kwargs)
        first, *others = model.names
        # In the base's own dtype: fp32 adapters on a bf16 base would be no faster.
        self._model: Any = PeftModel.from_pretrained(
            base, model.adapters / first, adapter_name=first, autocast_adapter_dtype=False
        )
        for name in others:
            self._model.load_adapter(model.adapters / name, adapter_name=name, autocast_adapter_dtype=False)
        self._model.eval()

    @torch.inference_mode()
    def one_by_one(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        """Each job alone, after `set_adapter`; jobs of one adapter follow one another, so it is set once
        for all."""
        answers: list[list[int]] = [[] for _ in jobs]
        started = time.perf_counter()
        active: str | None = None
        for index in sorted(range(len(jobs)), key=lambda index: jobs[index].adapter or ""):
            job = jobs[index]
            if job.adapter is None:
                with self._model.disable_adapter():
                    answers[index] = self._greedy([job.prompt], max_tokens)[0]
                continue
            if job.adapter != active:
                self._model.set_adapter(job.adapter)
                active = job.adapter
            answers[index] = self._greedy([job.prompt], max_tokens)[0]
        return Answered(time.perf_counter() - started, answers)

    @torch.inference_mode()
    def padded(self, jobs: Sequence[Job], max_tokens: int) -> Answered:
        """All jobs in one batch, shorter prompts padded, `adapter_names` saying whose row is whose."""
        prompts = [job.prompt for job in jobs]
        started = time.perf_counter()
        if all(job.adapter is None for job in jobs):
            with self._model.disable_adapter():
                answers = self._greedy(prompts, max_tokens)
        else:
            names = [job.adapter or _BASE_ROW for job in jobs]
            answers = self._greedy(prompts, max_tokens, adapter_names=names)
        return Answered(time.perf_counter() - started, answers)

    @torch.inference_mode()
    def margin(self, job: Job, answer: Sequence[int]) -> tuple[float, float]:
        """The margin of the token after `prompt + answer`: the gap between its two largest logits, and the
        largest logit in absolute value."""
        if job.adapter is not None:
            self._model.set_adapter(job.adapter)
        logits = self._model(input_ids=self._tensor([[*job.prompt, *answer]]), logits_to_keep=1).logits[0, -1]
        top = logits.topk(2).values
        return float(top[0] - top[1]), float(logits.abs().max())

    def _greedy(self, prompts: Sequence[Sequence[int]], max_tokens: int, **kwargs: Any) -> list[list[int]]:
        """Greedy tokens of each prompt, [rows][max_tokens]; end-of-sequence is a token like any other."""
        longest = max(map(len, prompts))
        input_ids = self._tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask: torch.Tensor | None = None
        if any(len(prompt) < longest for prompt in prompts):
            padding = self._tensor([longest - len(prompt) for prompt in prompts])
            mask = (torch.arange(longest, device=self._device) >= padding[:, None]).long()
        cache = DynamicCache(config=self._model.config)
        chosen: list[torch.Tensor] = []
        for _ in range(max_tokens):
            if mask is not None:
                kwargs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -input_ids.shape[1] :]
            logits = self._model(
                input_ids=input_ids,
                attention_mask=mask,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                **kwargs,
            ).logits
            input_ids = logits[:, -1].argmax(-1, keepdim=True)
            chosen.append(input_ids)
            if mask is not None:
                mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        tokens: list[list[int]] = torch.cat(chosen, dim=1).tolist()
        return tokens

    def _tensor(self, values: list[Any]) -> torch.Tensor:
        return torch.tensor(values, device=self._device)
