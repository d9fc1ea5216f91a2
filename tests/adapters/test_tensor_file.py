"""Files from outside: whatever their bytes are, reading them ends in a typed error or in the truth."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from loraplex_kernels.pool import MAX_RANK
from loraplex_server.adapters.files.manifest_file import read_manifest
from loraplex_server.adapters.files.tensor_file import MAX_HEADER_BYTES, read_header
from loraplex_server.adapters.files.weights import lay_out, read_weights
from loraplex_server.adapters.spec.refusals import MalformedFileError
from loraplex_server.adapters.spec.sites import SiteRegistry
from loraplex_server.core.errors import ServerError

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def file_of(header: Any, data: bytes = b"\0" * 24, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def read(content: bytes) -> Any:
    return read_header(io.BytesIO(content), len(content))


def test_a_header_reads_as_safetensors_reads_it(tmp_path: Path, write_adapter: Callable[..., Path]) -> None:
    path = write_adapter(tmp_path / "a", dtype=torch.bfloat16) / "adapter_model.safetensors"
    content = path.read_bytes()
    header = read(content)
    with safe_open(path, "pt") as expected:
        assert {tensor.name for tensor in header.tensors} == set(expected.keys())
        for tensor in header.tensors:
            values = torch.frombuffer(bytearray(content[tensor.begin : tensor.end]), dtype=torch.bfloat16)
            assert torch.equal(values.view(tensor.shape), expected.get_tensor(tensor.name))


def test_no_tensor_at_all_is_a_valid_file() -> None:
    assert read(file_of({}, b"")).tensors == ()


def described(**changes: Any) -> dict[str, Any]:
    return {"a": {**GOOD["a"], **changes}}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no header"),
        (b"\x01\x02", "no header"),
        (file_of(GOOD, length=1 << 62), str(MAX_HEADER_BYTES)),
        (file_of(GOOD, length=10_000), "ends before"),
        (file_of(b"[" * 100_000, b""), "not JSON"),
        (file_of(b"\xff\xfe", b""), "not JSON"),
        (file_of(b'{"a": 1' + b"0" * 5000 + b"}", b""), "not JSON"),
        (file_of([1], b""), "not a JSON object"),
        (file_of(b'{"a": {}, "a": {}}', b""), "repeated"),
        (file_of({"a": 7}), "'a' is not described"),
        (file_of({"a": {**GOOD["a"], "more": 1}}), "'a' is not described"),
        (file_of(described(dtype="F64")), "'a' has dtype 'F64'"),
        (file_of(described(dtype=["F32"])), "dtype"),
        (file_of(described(shape=[2, -3])), "shape"),
        (file_of(described(shape=[2, True])), "shape"),
        (file_of(described(shape=[2.0, 3])), "shape"),
        (file_of(described(shape=[1 << 60, 1 << 60])), "shape"),
        (file_of(described(shape=[1] * 9)), "shape"),
        (file_of(described(shape=[2, 4])), "cannot have 24 bytes"),
        (file_of(described(data_offsets=[24, 0])), "data_offsets"),
        (file_of(described(data_offsets=[0])), "data_offsets"),
        (file_of(described(data_offsets=[0, 1 << 52])), "cut"),
        (file_of(GOOD, b"\0" * 23), "cut"),
        (file_of(GOOD, b"\0" * 25), "end at byte"),
        (file_of(described(data_offsets=[1, 25]), b"\0" * 25), "was due"),
        (file_of({**GOOD, "b": GOOD["a"]}), "'b' begins"),
    ],
)
def test_malformed_files_are_refused(content: bytes, why: str) -> None:
    with pytest.raises(MalformedFileError) as caught:
        read(content)
    assert why in str(caught.value)
    assert str(caught.value).isascii()


def test_fuzzed_adapters_are_refused_or_whole(
    tmp_path: Path, write_adapter: Callable[..., Path], registry: SiteRegistry
) -> None:
    """500 spoiled adapters: each gets a typed error, or only its tensors' values were touched."""
    folder = write_adapter(tmp_path / "fuzzed", rank=3, config={"rank_pattern": {"k_proj": 2}})
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    originals = {path: path.read_bytes() for path in (weights, config)}
    header_end = 8 + int.from_bytes(originals[weights][:8], "little")
    rng = random.Random(7)
    served, errors = 0, list[ServerError]()
    for _ in range(500):
        path = rng.choice([weights, weights, config])
        spoiled = bytearray(originals[path])
        limit = len(spoiled) if path == config or rng.random() < 0.2 else header_end
        match rng.randrange(7):
            case 0:
                for _ in range(rng.randint(1, 4)):
                    spoiled[rng.randrange(limit)] = rng.randrange(256)
            case 1:
                spoiled[rng.randrange(limit)] ^= 1 << rng.randrange(8)
            case 2:
                del spoiled[rng.randrange(limit) :]
            case 3:
                begin = rng.randrange(limit)
                del spoiled[begin : begin + rng.randint(1, 40)]
            case 4:
                at = rng.randrange(limit)
                spoiled[at:at] = rng.randbytes(rng.randint(1, 40))
            case 5:
                spoiled = bytearray(rng.randbytes(rng.randrange(400)))
            case _:
                digits = [i for i in range(8, limit) if chr(spoiled[i]).isdigit()]
                spoiled[rng.choice(digits)] = ord(str(rng.randrange(10)))
        for other, content in originals.items():
            other.write_bytes(bytes(spoiled) if other == path else content)
        try:
            manifest = read_manifest("fuzzed", folder, registry, [tmp_path], MAX_RANK)
            blob = read_weights(manifest, lay_out(manifest, 96), torch.float32, [tmp_path])
        except ServerError as error:
            errors.append(error)
        else:
            served += 1
            assert torch.isfinite(blob.data).all()
            tensors = {tensor.name: tensor.shape for tensor in manifest.header.tensors}
            assert len(tensors) == 8, "an adapter was admitted in part"
            assert manifest.rank == 3
    assert {error.code for error in errors} == {"FAILED_PRECONDITION"}
    assert all("'fuzzed'" in str(error) and str(error).isascii() for error in errors)
    assert len(errors) > 350
    assert served > 10, "the fuzz never left an adapter whole, so it proves little"
