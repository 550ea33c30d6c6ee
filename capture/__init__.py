"""Token budgets, packing, static buffers and CUDA graphs for an encoder of images and videos."""

from .budgets import generate_budgets
from .config import EncoderCudaGraphConfig
from .cost import AssumedCosts, Costs, CostSample, Load, MeasuredCosts
from .cost_fit import fit_costs
from .data_parallel import DataParallelEncoder, Shard
from .dispatch import Dispatcher, plan
from .graph import BudgetGraphMetadata, CudaGraphRecorder, Recorder, Recording
from .ladder import MemoryModel, expected_cost, fit_budgets, least_useful
from .manager import EncoderCudaGraphManager
from .memory import MemoryProfile
from .metrics import StatsCollector, prometheus_text
from .multi_path import MultiPathManager
from .packing import Batch
from .protocol import (
    BufferSpec,
    EncoderItemSpec,
    Pruning,
    RecordsVariants,
    RungLimits,
    StagesInputs,
    SupportsEncoderCudaGraph,
)
from .slots import Lease

__all__ = [
    "AssumedCosts",
    "Batch",
    "BudgetGraphMetadata",
    "BufferSpec",
    "CostSample",
    "Costs",
    "CudaGraphRecorder",
    "DataParallelEncoder",
    "Dispatcher",
    "EncoderCudaGraphConfig",
    "EncoderCudaGraphManager",
    "EncoderItemSpec",
    "Lease",
    "Load",
    "MeasuredCosts",
    "MemoryModel",
    "MemoryProfile",
    "MultiPathManager",
    "Pruning",
    "Recorder",
    "Recording",
    "RecordsVariants",
    "RungLimits",
    "Shard",
    "StagesInputs",
    "StatsCollector",
    "SupportsEncoderCudaGraph",
    "expected_cost",
    "fit_budgets",
    "fit_costs",
    "generate_budgets",
    "least_useful",
    "plan",
    "prometheus_text",
]
