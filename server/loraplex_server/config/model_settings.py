"""Settings of the base model."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Annotated, Literal

from loraplex_server.config.declared import check
from loraplex_server.config.kinds import Count, Numbers, Text
from loraplex_server.config.setting import NOT_NEGATIVE, POSITIVE, Group, Setting

Quantization = Literal["nf4", "int4", "none"]
Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Kernels = Literal["auto", "torch", "triton"]
GenerationDefaults = Literal["auto", "none"]
CudaGraphs = Literal["auto", "on", "off"]

_model = partial(Setting, group=Group.MODEL)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    model: Annotated[
        Text,
        _model(
            help="a Hugging Face checkpoint: its folder, or its name on the hub",
            metavar="PATH|HUB_ID",
        ),
    ]
    quantization: Annotated[
        Quantization, _model(help="4-bit format of the weights; none does not quantise")
    ] = "nf4"
    double_quant: Annotated[
        bool, _model(help="quantise the scales of nf4 too, which saves 0.4 bits per weight")
    ] = False
    device: Annotated[Device, _model(help="where to compute; auto is cuda if there is one")] = "auto"
    dtype: Annotated[
        Dtype, _model(help="type of the activations; auto is float32 on a CPU, bfloat16 on a GPU that has it")
    ] = "auto"
    kernels: Annotated[
        Kernels, _model(help="which kernels to run; auto is triton on cuda, torch on a CPU")
    ] = "auto"
    generation_config: Annotated[
        GenerationDefaults,
        _model(
            help="sampling defaults; auto takes them from the checkpoint's generation_config.json",
            detail="With `none`, requests that leave sampling parameters open get the server's own defaults.",
        ),
    ] = "auto"
    threads: Annotated[
        Count,
        _model(help="CPU threads of the engine; 0 is all cores but one", range=NOT_NEGATIVE, unit="threads"),
    ] = 0
    cuda_graphs: Annotated[
        CudaGraphs,
        _model(
            help="record decode steps at start and replay them; auto does so where the device can, on "
            "refuses to start where it cannot",
            detail="`auto` records where the Triton kernels run on CUDA. `on` records under Triton's "
            "interpreter too.",
        ),
    ] = "auto"
    cuda_graph_sizes: Annotated[
        Numbers,
        _model(
            help="numbers of requests to record decode steps for",
            default="up to --max-num-requests",
            range=POSITIVE,
            unit="requests",
        ),
    ] = ()

    def __post_init__(self) -> None:
        check(self)
