"""Tensor operations of loraplex: 4-bit base weights, paged attention, and what many adapters do to a batch.

An op is a folder. ``__init__`` has the public names and the checks, and chooses the implementation;
``reference`` is plain torch: the specification, and the CPU path; ``kernel`` holds Triton kernels, and
``launch`` starts them where that takes more than a few lines. Ops without a kernel are torch on every device.
Tests are ``tests/ops/test_<name>*.py``, benches ``bench/loraplex_bench/ops/<name>.py``.

==================  ===================================  ===============  =========  ===========  =========
op                  meaning                              reference        kernel     test         bench
==================  ===================================  ===============  =========  ===========  =========
`quant`             products with 4-bit weights          `nf4`, `int4`,   `kernel`   quant, nf4,  quant
                                                         `blocked`                   int4
`attention`         paged ragged attention, KV cache     `reference`      `kernel`   attention    attention
`attention.rotary`  rotation, and the write of keys      `reference`      `kernel`   fused        fused
`norm`              RMS norm, after the residual sum     `reference`      `kernel`   fused        fused
`gated`             the activation of a gated MLP        `reference`      `kernel`   fused        fused
`lora`              Σ weight · (x @ A.T) @ B             `reference`      `kernel`   lora         lora
`vectors`           scales, biases, soft prompts         `reference`                 vectors
`bottleneck`        small networks of adapters           `reference`                 bottleneck
`replacement`       weights in place of the base's       `reference`                 vocabulary
`vocabulary`        rows and pairs of token ids          `reference`                 vocabulary
==================  ===================================  ===============  =========  ===========  =========

No op imports another. They share `pool` (the adapters' device memory and the step's metadata), `dispatch`
(Triton or torch), `dense` (products on a CPU), `parallel` (threads), `strides` and ``_sparse``. Nothing here
knows about requests, adapters on disk, or the server, and importing this package imports nothing else.
"""
