"""TFRecord files as TensorFlow Datasets writes them, read without TensorFlow.

A file is a row of records, little-endian (tensorflow/core/lib/io/record_writer.h):
    uint64 length, uint32 masked CRC32C of the length, `length` bytes of data, uint32 masked CRC32C of the data
The data are a tf.train.Example (tensorflow/core/example/{example,feature}.proto). It is flat: the values of a feature
lie under its path, such as steps/observation/image, and the values of all steps lie one after another
(tensorflow_datasets/core/example_serializer.py):
    images     encoded, as JPEG or PNG                           bytes_list
    text       UTF-8                                             bytes_list
    tensors    float64 as float32, bool and uint8 as int64       float_list, int64_list
               with encoding zlib or bytes: one array a step     bytes_list
features.json says what type each feature has. Sequences within a step are stored otherwise and are not read.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import google_crc32c
import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format
from google.protobuf.message import DecodeError

Example = Mapping[str, Any]  # a tf.train.Feature by its path
NUMBERS = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64".split()
PROTO = """
name: "example.proto" package: "tensorflow" syntax: "proto3"
message_type { name: "BytesList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_BYTES } }
message_type { name: "FloatList" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_FLOAT } }
message_type { name: "Int64List" field { name: "value" number: 1 label: LABEL_REPEATED type: TYPE_INT64 } }
message_type {
  name: "Feature" oneof_decl { name: "kind" }
  field { name: "bytes_list" number: 1 type_name: "BytesList" oneof_index: 0 }
  field { name: "float_list" number: 2 type_name: "FloatList" oneof_index: 0 }
  field { name: "int64_list" number: 3 type_name: "Int64List" oneof_index: 0 }
}
message_type {
  name: "Features" field { name: "feature" number: 1 label: LABEL_REPEATED type_name: "FeatureEntry" }
  nested_type {
    name: "FeatureEntry" options { map_entry: true }
    field { name: "key" number: 1 type: TYPE_STRING } field { name: "value" number: 2 type_name: "Feature" }
  }
}
message_type { name: "Example" field { name: "features" number: 1 type_name: "Features" } }
"""
pool = descriptor_pool.DescriptorPool()  # our own, for TensorFlow puts the same names into the default one
pool.AddSerializedFile(text_format.Parse(PROTO, descriptor_pb2.FileDescriptorProto()).SerializeToString())
ExampleProto: Any = message_factory.GetMessageClass(pool.FindMessageTypeByName("tensorflow.Example"))


class Record(NamedTuple):
    name: str  # of the file, and its place there
    data: bytes
    checksum: int

    def verified(self) -> bytes:
        if masked_crc32c(self.data) != self.checksum:
            raise ValueError(f"{self.name}: the checksum of its data is wrong; the file is damaged")
        return self.data


def masked_crc32c(data: bytes) -> int:
    """CRC32C, rotated right by 15 bits and shifted by a constant, as TFRecord files store it."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def open_file(path: str):
    """Opens a local path, or a URL by fsspec, for reading bytes."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()  # pyright: ignore[reportAttributeAccessIssue]  one path gives one file


def read_records(path: str, num_records: int | None = None) -> Iterator[Record]:
    """The records of a file, one in memory at a time. `Record.verified` checks their data.

    Raises ValueError where the file cannot be read, a length is damaged (the next record cannot be found then), the
    file ends within a record, or the number of records differs from `num_records`.
    """
    try:
        file = open_file(path)
    except (OSError, ImportError) as error:
        raise ValueError(f"{path}: cannot be opened: {error}") from error
    with file:
        number = 0
        while True:
            name = f"{path}, record {number}"
            header = _read(file, 12, name)
            if not header:
                break
            if len(header) < 12:
                raise ValueError(f"{name}: truncated; the file ends within its header")
            length, checksum = struct.unpack("<QI", header)
            if masked_crc32c(header[:8]) != checksum:
                raise ValueError(
                    f"{name}: the checksum of its length is wrong; the file is damaged or no TFRecord file"
                )
            data, footer = _read(file, length, name), _read(file, 4, name)
            if len(data) < length or len(footer) < 4:
                raise ValueError(f"{name}: truncated; expected {length + 4} bytes, got {len(data) + len(footer)}")
            yield Record(name, data, *struct.unpack("<I", footer))
            number += 1
    if num_records is not None and number != num_records:
        raise ValueError(f"{path}: expected {num_records} records, got {number}")


def _read(file, size: int, name: str) -> bytes:
    """Reads `size` bytes, fewer only at the end of the file: one read of a remote file may return fewer."""
    parts = []
    try:
        while size and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error}") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_example(data: bytes) -> Example:
    """The features of a record by their paths. Raises ValueError where the data are no tf.train.Example."""
    try:
        return ExampleProto.FromString(data).features.feature
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example: {error}") from error


class Feature(NamedTuple):
    kind: str  # tensor, image, text, classLabel; others are not read
    dtype: str
    shape: tuple[int, ...]  # -1 where it varies
    encoding: str  # of a tensor: none, bytes or zlib
    depth: int  # how many sequences it lies in: 0 for a value of the episode, 1 for a value of each step


def read_features(uri: str, tree: dict) -> dict[str, Feature]:
    """The features in features.json by their paths (tensorflow_datasets/core/proto/feature.proto)."""
    features = {}

    def walk(node: dict, path: str, depth: int) -> None:
        if "featuresDict" in node:
            for key, inner in node["featuresDict"]["features"].items():
                walk(inner, f"{path}/{key}" if path else key, depth)
        elif "sequence" in node:
            walk(node["sequence"]["feature"], path, depth + 1)
        else:
            kind = next(key for key in (*node, "unknown") if key not in ("pythonClassName", "description"))
            what = node.get(kind, {})
            shape = tuple(int(size) for size in what.get("shape", {}).get("dimensions", ()))
            dtype = {"text": "string", "classLabel": "int64"}.get(kind) or what.get("dtype", "")
            features[path] = Feature(kind, dtype, shape, what.get("encoding", "none").lower(), depth)

    if "featuresDict" not in tree:
        raise ValueError(
            f"{uri}: expected features.json as tensorflow_datasets 4.5 or later writes it, got keys {sorted(tree)}"
        )
    walk(tree, "", 0)
    return features


def read_strings(example: Example, path: str) -> list[bytes]:
    """The values of a feature of bytes: one, or one a step."""
    return list(values_of(example, path, "bytes"))


def read_tensor(example: Example, path: str, feature: Feature) -> np.ndarray:
    """The values of a feature of numbers: (*shape), or (t, *shape) where it has a value for each step."""
    if feature.encoding == "none":
        kind, dtype = ("float", np.float32) if "float" in feature.dtype else ("int64", np.int64)
        numbers = values_of(example, path, kind)
        values = np.fromiter(numbers, dtype, len(numbers)).astype(feature.dtype)
    else:
        unpack = zlib.decompress if feature.encoding == "zlib" else bytes
        try:
            arrays = [unpack(array) for array in read_strings(example, path)]
        except zlib.error as error:
            raise ValueError(f"{path} is not a zlib stream: {error}") from error
        values = np.frombuffer(b"".join(arrays), feature.dtype)
    size = math.prod(feature.shape)
    if len(values) % size or (not feature.depth and len(values) != size):
        raise ValueError(f"{path} has {len(values)} numbers, expected {list(feature.shape)}{' a step' * feature.depth}")
    return values.reshape((-1, *feature.shape) if feature.depth else feature.shape)


def values_of(example: Example, path: str, kind: Literal["bytes", "float", "int64"]) -> Sequence:
    """The list of one kind in a feature; () where it has no list."""
    if path not in example:
        raise ValueError(f"{path} is missing")
    stored = example[path].WhichOneof("kind")
    if stored is None:
        return ()
    if stored != f"{kind}_list":
        raise ValueError(f"{path} has a {stored}, but features.json says {kind}_list")
    return getattr(example[path], stored).value
