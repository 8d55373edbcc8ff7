"""What the kernels of ONNX Runtime's CUDA provider take, where they take less than the operator's specification.

A kernel refuses at run time, so a pass asks here first and leaves the graph as it is where the answer is no. Read in
https://github.com/microsoft/onnxruntime, folder onnxruntime/contrib_ops/cuda, and compared with the messages in the
wheel of onnxruntime-gpu 1.31.1.
"""

from __future__ import annotations

WIDEST_GROUP = 512
# diffusion/bias_split_gelu.cc. 1.31.1 also takes 6144 and 12288; older releases do not.
GEGLU_SIZES = (2560, 5120, 10240)
# diffusion/bias_add.cc: older releases take no others. 1.31.1 has lost that check, and has a loop for any size.
BIAS_ADD_SIZES = (320, 640, 1280)


def group_norm(channels: int, groups: int) -> bool:
    """Return whether GroupNorm and SkipGroupNorm run: whole groups of an even number of channels, 512 at most.

    A thread takes two channels, and a block whole groups of up to 512 channels in all (diffusion/group_norm_impl.cu,
    group_norm_common_base.cc).
    """
    size, rest = divmod(channels, groups)
    return not rest and size % 2 == 0 and size <= WIDEST_GROUP
