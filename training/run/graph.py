"""CUDA graphs: a function whose kernels a GPU is told of once, and then told to repeat.

A step launches about a thousand kernels, most of them short; with a small network the GPU waits for the host. What has
no gradients has the same shapes in every step, and becomes one launch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_Recording = tuple[torch.cuda.CUDAGraph, list[Tensor], list[Tensor]]  # with its inputs and outputs
_WARM_UP = 3  # calls that are not recorded: kernels are chosen, compiled and given their memory


def graphed(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Makes a function of tensors repeat a recording of itself, one for each combination of their shapes, on a GPU.

    It may not wait for the GPU, nor depend on anything that changes but its arguments. What it returns is overwritten
    by the next call. On a CPU it is called as it is.
    """
    recordings: dict[tuple[torch.Size, ...], _Recording] = {}

    def call(*arguments: Tensor) -> list[Tensor]:
        if not arguments[0].is_cuda:
            return function(*arguments)
        shapes = tuple(argument.shape for argument in arguments)
        with torch.cuda.device(arguments[0].device):  # which need not be the current one
            if shapes not in recordings:
                memory = next(iter(recordings.values()))[0].pool() if recordings else None
                recordings[shapes] = _record(function, arguments, memory)
            graph, inputs, outputs = recordings[shapes]
            torch._foreach_copy_(inputs, list(arguments))
            graph.replay()
        return outputs

    return call


def _record(function: Callable[..., list[Tensor]], arguments: tuple[Tensor, ...], memory: Any) -> _Recording:
    """Records a function; recordings share memory for what lies between, as they never run at once."""
    inputs, graph, stream = [one.clone() for one in arguments], torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(stream)
    # Of this thread alone: another one may be putting the next batch into pinned memory.
    with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
        outputs = function(*inputs)
    return graph, inputs, outputs
