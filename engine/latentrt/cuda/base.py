"""What other rooms know of a GPU: its memory, and the one device that they queue work on."""

from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Cuda as Gpu
from latentrt.cuda.gpu import CudaGraph as Graph

__all__ = ["DeviceArray", "Gpu", "Graph"]
