"""Token budgets, packing, static buffers and CUDA graphs for an encoder of images and videos."""

from .budgets import generate_budgets
from .config import EncoderCudaGraphConfig
from .graph import BudgetGraphMetadata, CudaGraphRecorder, Recorder, Recording
from .manager import EncoderCudaGraphManager
from .packing import Batch, pack
from .protocol import BufferSpec, EncoderItemSpec, RungLimits, SupportsEncoderCudaGraph

__all__ = [
    "Batch",
    "BudgetGraphMetadata",
    "BufferSpec",
    "CudaGraphRecorder",
    "EncoderCudaGraphConfig",
    "EncoderCudaGraphManager",
    "EncoderItemSpec",
    "Recorder",
    "Recording",
    "RungLimits",
    "SupportsEncoderCudaGraph",
    "generate_budgets",
    "pack",
]
