"""Start-up of vLLM's own environment, where `make setup-vllm` puts it: sitecustomize.py.

torchvision's wheel is built for another torch than vLLM's, so its operators are not loaded, and its import insists on
two of them. What vLLM wants of it, the transforms of images, needs none.
"""

import importlib.util
import sys

if importlib.util.find_spec("torchvision") is not None and "pip" not in sys.orig_argv:
    import torch

    operators = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
