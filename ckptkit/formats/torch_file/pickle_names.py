"""The names that a checkpoint's pickle may use. None of them is ever imported or called.

A name in this list either has a meaning of its own (`pickles.py`) or comes back as an inert `Record`. A name that
is missing is refused: a checkpoint has no need for it, and an exploit has.

Sources: torch's weights-only list, `megatron.core.safe_globals`, what `torch.save` and `torch.distributed.checkpoint`
of torch 2.13 write for the objects concerned, and the older spellings of the same classes.
"""

from __future__ import annotations

from ckptkit.dtypes import DTYPES_BY_TORCH_NAME
from ckptkit.formats.torch_file.torch_types import FOREIGN_TORCH_DTYPES, STORAGE_DTYPE_NAMES

_STORAGES = " ".join(STORAGE_DTYPE_NAMES)
_REBUILDS = (
    "_rebuild_parameter _rebuild_parameter_with_state _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 "
    "_rebuild_qtensor _rebuild_sparse_tensor _rebuild_meta_tensor_no_storage _rebuild_nested_tensor "
    "_rebuild_wrapper_subclass _rebuild_device_tensor_from_numpy _rebuild_device_tensor_from_cpu_tensor"
)
_PLACEMENTS = "Placement Shard _StridedShard Replicate Partial _Partial _MaskPartial"
_MEGATRON_ENUMS = (
    "ModelType LayerType AttnType AttnMaskType AttnBackend CudaGraphScope CudaGraphModule InferenceCudaGraphScope "
    "Fp8Recipe Fp4Recipe"
)
_ARRAYS = "_reconstruct scalar"
_DTYPE_CLASSES = (
    "BoolDType Int8DType Int16DType Int32DType Int64DType UInt8DType UInt16DType UInt32DType UInt64DType "
    "Float16DType Float32DType Float64DType StrDType BytesDType ObjectDType"
)

_LISTED: dict[str, str] = {
    "builtins": "set frozenset list dict tuple bytes bytearray complex slice range int float str bool",
    "collections": "OrderedDict Counter defaultdict deque",
    "_codecs": "encode",
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "_io": "BytesIO",
    "io": "BytesIO",
    "signal": "Signals",
    "numpy": "ndarray dtype bool_ bool float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64",
    "numpy.core.multiarray": _ARRAYS,
    "numpy._core.multiarray": _ARRAYS,
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.dtypes": _DTYPE_CLASSES,
    "numpy.random._pickle": "__randomstate_ctor __generator_ctor __bit_generator_ctor",
    "numpy.random._mt19937": "MT19937",
    "numpy.random._pcg64": "PCG64 PCG64DXSM",
    "torch": f"Tensor Size device Generator strided per_tensor_affine per_tensor_symmetric per_channel_affine "
    f"per_channel_symmetric per_channel_affine_float_qparams {_STORAGES}",
    "torch.cuda": _STORAGES,
    "torch._C": "Generator",
    "torch._utils": _REBUILDS,
    "torch._tensor": "_rebuild_from_type_v2 Tensor",
    "torch.nn.parameter": "Parameter Buffer",
    "torch.serialization": "_get_layout",
    "torch.storage": "UntypedStorage TypedStorage _load_from_bytes",
    "torch.torch_version": "TorchVersion",
    "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex TensorStorageMetadata BytesStorageMetadata "
    "ChunkStorageMetadata TensorProperties StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix SerializationFormat",
    "torch.distributed.checkpoint.planner": "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    "torch.distributed._shard.sharded_tensor.metadata": "TensorProperties MEM_FORMAT_ENCODING ShardedTensorMetadata",
    "torch.distributed._shard.metadata": "ShardMetadata",
    "torch.distributed._shard.sharded_tensor.api": "ShardedTensor ShardedTensor.ProcessGroupState",
    "torch.distributed._shard.sharded_tensor.shard": "Shard",
    "torch.distributed._shard.sharding_spec.chunk_sharding_spec": "ChunkShardingSpec",
    "torch.distributed._shard.sharding_spec.api": "EnumerableShardingSpec",
    "torch.distributed.remote_device": "_remote_device",
    "torch.distributed.device_mesh": "DeviceMesh",
    "torch.distributed._mesh_layout": "_MeshLayout _FlatLayout",
    "torch.distributed.tensor": "DTensor",
    "torch.distributed.tensor._api": "DTensor",
    "torch.distributed._tensor": "DTensor",
    "torch.distributed._tensor.api": "DTensor",
    "torch.distributed.tensor._dtensor_spec": "DTensorSpec TensorMeta ShardOrderEntry",
    "torch.distributed._tensor._dtensor_spec": "DTensorSpec TensorMeta",
    "torch.distributed._tensor.placement_types": f"DTensorSpec TensorMeta {_PLACEMENTS}",
    "torch.distributed.tensor.placement_types": _PLACEMENTS,
    "megatron.core.enums": _MEGATRON_ENUMS,
    "megatron.core.transformer.enums": _MEGATRON_ENUMS,
    "megatron.model.enums": _MEGATRON_ENUMS,
    "megatron.legacy.model.enums": _MEGATRON_ENUMS,
    # What torch.storage._load_from_bytes is called by a process that has imported Megatron-Core 0.19.
    "megatron.core.safe_globals": "safe_load_from_bytes",
    "megatron.core.transformer.pipeline_parallel_layer_layout": "PipelineParallelLayerLayout",
    "megatron.core.optimizer.optimizer_config": "OptimizerConfig AdamOptimizerConfig SGDOptimizerConfig ParamKey "
    "ParamPredicate ParamWithNamePredicate",
    "megatron.core.rerun_state_machine": "RerunDiagnostic RerunMode RerunState RerunValidationStatus Call Caller "
    "QuickStats",
    "megatron.core.dist_checkpointing.strategies.torch": "MCoreMetadata MCoreSavePlan",
}

LISTED_NAMES: frozenset[tuple[str, str]] = frozenset(
    (module, name) for module, names in _LISTED.items() for name in names.split()
)
"""(module, name) of everything a file may name, dtypes apart, as Python 3 spells the modules."""

LISTED_DTYPES: frozenset[str] = frozenset(DTYPES_BY_TORCH_NAME) | FOREIGN_TORCH_DTYPES
"""`name` of every `torch.<name>` that is an element type."""

NESTED_CLASSES: frozenset[tuple[str, str]] = frozenset(
    (f"{module}.{outer}", inner) for module, name in LISTED_NAMES for outer, _, inner in (name.partition("."),) if inner
)
"""(class, name in it) of listed classes inside others, which protocols before 4 spell as a `getattr`."""

PYTHON2_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}
PYTHON2_NAMES = {"xrange": "range", "unicode": "str", "long": "int"}
"""Names of protocol 2 for modules and objects that Python 3 has renamed."""
