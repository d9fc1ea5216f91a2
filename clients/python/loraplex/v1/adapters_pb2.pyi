from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_UNLOADED: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADING: _ClassVar[AdapterState]
    ADAPTER_STATE_HOST: _ClassVar[AdapterState]
    ADAPTER_STATE_COPYING: _ClassVar[AdapterState]
    ADAPTER_STATE_DEVICE: _ClassVar[AdapterState]

class CombinationType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMBINATION_TYPE_UNSPECIFIED: _ClassVar[CombinationType]
    COMBINATION_TYPE_LINEAR: _ClassVar[CombinationType]
    COMBINATION_TYPE_CAT: _ClassVar[CombinationType]
    COMBINATION_TYPE_SVD: _ClassVar[CombinationType]
    COMBINATION_TYPE_TIES: _ClassVar[CombinationType]
    COMBINATION_TYPE_TIES_SVD: _ClassVar[CombinationType]
    COMBINATION_TYPE_DARE_LINEAR: _ClassVar[CombinationType]
    COMBINATION_TYPE_DARE_TIES: _ClassVar[CombinationType]
    COMBINATION_TYPE_DARE_LINEAR_SVD: _ClassVar[CombinationType]
    COMBINATION_TYPE_DARE_TIES_SVD: _ClassVar[CombinationType]
    COMBINATION_TYPE_MAGNITUDE_PRUNE: _ClassVar[CombinationType]
    COMBINATION_TYPE_MAGNITUDE_PRUNE_SVD: _ClassVar[CombinationType]

class MajoritySign(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAJORITY_SIGN_UNSPECIFIED: _ClassVar[MajoritySign]
    MAJORITY_SIGN_TOTAL: _ClassVar[MajoritySign]
    MAJORITY_SIGN_FREQUENCY: _ClassVar[MajoritySign]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_UNLOADED: AdapterState
ADAPTER_STATE_LOADING: AdapterState
ADAPTER_STATE_HOST: AdapterState
ADAPTER_STATE_COPYING: AdapterState
ADAPTER_STATE_DEVICE: AdapterState
COMBINATION_TYPE_UNSPECIFIED: CombinationType
COMBINATION_TYPE_LINEAR: CombinationType
COMBINATION_TYPE_CAT: CombinationType
COMBINATION_TYPE_SVD: CombinationType
COMBINATION_TYPE_TIES: CombinationType
COMBINATION_TYPE_TIES_SVD: CombinationType
COMBINATION_TYPE_DARE_LINEAR: CombinationType
COMBINATION_TYPE_DARE_TIES: CombinationType
COMBINATION_TYPE_DARE_LINEAR_SVD: CombinationType
COMBINATION_TYPE_DARE_TIES_SVD: CombinationType
COMBINATION_TYPE_MAGNITUDE_PRUNE: CombinationType
COMBINATION_TYPE_MAGNITUDE_PRUNE_SVD: CombinationType
MAJORITY_SIGN_UNSPECIFIED: MajoritySign
MAJORITY_SIGN_TOTAL: MajoritySign
MAJORITY_SIGN_FREQUENCY: MajoritySign

class Adapter(_message.Message):
    __slots__ = ("name", "source", "state", "pinned", "peft_type", "rank", "target_modules", "bytes", "content_hash", "references", "draining", "hits", "misses", "evictions")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PEFT_TYPE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_MODULES_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTENT_HASH_FIELD_NUMBER: _ClassVar[int]
    REFERENCES_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    state: AdapterState
    pinned: bool
    peft_type: str
    rank: int
    target_modules: _containers.RepeatedScalarFieldContainer[str]
    bytes: int
    content_hash: str
    references: int
    draining: bool
    hits: int
    misses: int
    evictions: int
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., state: _Optional[_Union[AdapterState, str]] = ..., pinned: bool = ..., peft_type: _Optional[str] = ..., rank: _Optional[int] = ..., target_modules: _Optional[_Iterable[str]] = ..., bytes: _Optional[int] = ..., content_hash: _Optional[str] = ..., references: _Optional[int] = ..., draining: bool = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., evictions: _Optional[int] = ...) -> None: ...

class LoadAdapterRequest(_message.Message):
    __slots__ = ("name", "source", "load_inplace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    LOAD_INPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    source: str
    load_inplace: bool
    def __init__(self, name: _Optional[str] = ..., source: _Optional[str] = ..., load_inplace: bool = ...) -> None: ...

class LoadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class CompositionMember(_message.Message):
    __slots__ = ("adapter", "weight")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    weight: float
    def __init__(self, adapter: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class RegisterCompositionRequest(_message.Message):
    __slots__ = ("name", "combination_type", "members", "density", "majority_sign", "svd_rank", "seed", "load_inplace")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COMBINATION_TYPE_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    DENSITY_FIELD_NUMBER: _ClassVar[int]
    MAJORITY_SIGN_FIELD_NUMBER: _ClassVar[int]
    SVD_RANK_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    LOAD_INPLACE_FIELD_NUMBER: _ClassVar[int]
    name: str
    combination_type: CombinationType
    members: _containers.RepeatedCompositeFieldContainer[CompositionMember]
    density: float
    majority_sign: MajoritySign
    svd_rank: int
    seed: int
    load_inplace: bool
    def __init__(self, name: _Optional[str] = ..., combination_type: _Optional[_Union[CombinationType, str]] = ..., members: _Optional[_Iterable[_Union[CompositionMember, _Mapping]]] = ..., density: _Optional[float] = ..., majority_sign: _Optional[_Union[MajoritySign, str]] = ..., svd_rank: _Optional[int] = ..., seed: _Optional[int] = ..., load_inplace: bool = ...) -> None: ...

class RegisterCompositionResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("name", "config", "sha256", "size", "load_inplace", "files")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    LOAD_INPLACE_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    name: str
    config: str
    sha256: str
    size: int
    load_inplace: bool
    files: _containers.RepeatedCompositeFieldContainer[UploadedFile]
    def __init__(self, name: _Optional[str] = ..., config: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ..., load_inplace: bool = ..., files: _Optional[_Iterable[_Union[UploadedFile, _Mapping]]] = ...) -> None: ...

class UploadedFile(_message.Message):
    __slots__ = ("name", "sha256", "size")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    name: str
    sha256: str
    size: int
    def __init__(self, name: _Optional[str] = ..., sha256: _Optional[str] = ..., size: _Optional[int] = ...) -> None: ...

class UploadAdapterRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UploadAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class UnloadAdapterRequest(_message.Message):
    __slots__ = ("name", "grace_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GRACE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    grace_seconds: float
    def __init__(self, name: _Optional[str] = ..., grace_seconds: _Optional[float] = ...) -> None: ...

class UnloadAdapterResponse(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, remaining: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class ListAdaptersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdaptersResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...

class GetAdapterRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class GetAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class PinAdapterRequest(_message.Message):
    __slots__ = ("name", "pinned")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    name: str
    pinned: bool
    def __init__(self, name: _Optional[str] = ..., pinned: bool = ...) -> None: ...

class PinAdapterResponse(_message.Message):
    __slots__ = ("adapter",)
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    adapter: Adapter
    def __init__(self, adapter: _Optional[_Union[Adapter, _Mapping]] = ...) -> None: ...

class PrefetchRequest(_message.Message):
    __slots__ = ("names", "host_only")
    NAMES_FIELD_NUMBER: _ClassVar[int]
    HOST_ONLY_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    host_only: bool
    def __init__(self, names: _Optional[_Iterable[str]] = ..., host_only: bool = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("names",)
    NAMES_FIELD_NUMBER: _ClassVar[int]
    names: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, names: _Optional[_Iterable[str]] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("adapters", "removed")
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    removed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ..., removed: _Optional[_Iterable[str]] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("adapters",)
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    adapters: _containers.RepeatedCompositeFieldContainer[Adapter]
    def __init__(self, adapters: _Optional[_Iterable[_Union[Adapter, _Mapping]]] = ...) -> None: ...
