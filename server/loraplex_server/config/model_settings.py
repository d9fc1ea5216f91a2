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
            help="a Hugging Face checkpoint",
            metavar="PATH|HUB_ID",
            detail="A folder with the checkpoint, or the name of a repository on the Hugging Face hub.",
        ),
    ]
    quantization: Annotated[Quantization, _model(help="type of the resident weights")] = "nf4"
    double_quant: Annotated[
        bool, _model(help="quantise the scales of nf4 as well, which saves 0.4 bits a weight")
    ] = False
    device: Annotated[Device, _model(help="where to compute; auto is cuda where there is one")] = "auto"
    dtype: Annotated[Dtype, _model(help="type of the activations")] = "auto"
    kernels: Annotated[Kernels, _model(help="auto is triton on cuda, torch on cpu")] = "auto"
    generation_config: Annotated[
        GenerationDefaults,
        _model(
            help="auto takes the defaults of sampling from the checkpoint's generation_config.json",
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
            help="record decode steps at start and replay them; auto is where the device can, on is that or "
            "no start",
            detail="`auto` records where the Triton kernels run on CUDA. `on` also records under Triton's "
            "interpreter, and the server does not start where it cannot.",
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
