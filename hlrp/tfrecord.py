"""TFRecord files and the tf.train.Example protos in them, without TensorFlow.

A file is a row of records, little-endian (tensorflow/core/lib/io/record_writer.h):
    uint64 length, uint32 masked crc32c of it, `length` bytes of data, uint32 masked crc32c of them
The data are a proto (tensorflow/core/example/{example,feature}.proto; protobuf.dev/programming-guides/encoding):
    Example   {Features features = 1}
    Features  {map<string, Feature> feature = 1}, each entry a message {string key = 1, Feature value = 2}
    Feature   {oneof: BytesList = 1, FloatList = 2, Int64List = 3}, each a message {repeated value = 1}

The features of a data set that TensorFlow Datasets wrote: their types, from features.json, and their values.

The values of a record lie in a flat tf.train.Example under the paths of their features, such as
steps/observation/image, those of all steps one after another (tensorflow_datasets/core/example_serializer.py):
    images     as they are encoded                          bytes_list
    text       UTF-8                                        bytes_list
    tensors    float64 as float32, bool and uint8 as int64  float_list, int64_list
               of encoding zlib or bytes: an array a step   bytes_list
Sequences within a step, which lie elsewhere, are not read.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
import numpy as np

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5  # wire types
BLOCK_SIZE = 1 << 20  # bytes of varints that are decoded at once


class Record(NamedTuple):
    name: str  # of the file, and its place there
    data: bytes
    checksum: int

    def verified(self) -> bytes:
        if masked_crc32c(self.data) != self.checksum:
            raise ValueError(f"{self.name}: the checksum of its data is wrong; a damaged file")
        return self.data


def masked_crc32c(data: bytes) -> int:
    """Rotated right by 15 bits and shifted by a constant, since a checksum of checksums would say little."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def open_file(path: str):
    """A local file, or whatever fsspec knows by a URL, from its begin on."""
    if "://" not in path:
        return open(path, "rb")
    import fsspec

    return fsspec.open(path, "rb").open()


def read_records(path: str, num_records: int | None = None) -> Iterator[Record]:
    """The records of a file, one in memory at a time. Their data are not checked here, but by `Record.verified`.

    Raises ValueError where a length is damaged, behind which no record can be found; where the file ends within a
    record; and where it does not have `num_records` of them.
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
                raise ValueError(f"{name}: the checksum of its length is wrong; a damaged file, or none of TFRecords")
            data, footer = _read(file, length, name), _read(file, 4, name)
            if len(data) < length or len(footer) < 4:
                raise ValueError(f"{name}: truncated; {len(data) + len(footer)} of {length + 4} bytes are there")
            yield Record(name, data, *struct.unpack("<I", footer))
            number += 1
    if num_records is not None and number != num_records:
        raise ValueError(f"{path}: {number} records, but {num_records} are expected")


def _read(file, size: int, name: str) -> bytes:
    """`size` bytes, or fewer at the end of the file: one read of a remote file may give less than asked for."""
    parts = []
    try:
        while size and (part := file.read(size)):
            parts.append(part)
            size -= len(part)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read: {error}") from error
    return parts[0] if len(parts) == 1 else b"".join(parts)


def parse_example(data: bytes) -> dict[str, memoryview]:
    """The features of an Example by name, each as it is encoded. Raises ValueError where data are none."""
    features = {}
    for message in messages(memoryview(data), 1):
        for entry in messages(message, 1):
            key, value = (messages(entry, number) or [memoryview(b"")] for number in (1, 2))
            features[str(key[-1], "utf-8")] = value[-1]  # of a field that comes twice, the last one counts
    return features


def parse_feature(feature: memoryview, dtype: str = "int64") -> list[bytes] | np.ndarray:
    """Its values: bytes, float32 (n,), or whole numbers as `dtype` (n,); [] where it has none of any kind."""
    kinds = [(number, body) for number in (1, 2, 3) for body in messages(feature, number)]
    if not kinds:
        return []
    kind, body = kinds[-1]
    if kind == 1:
        return [bytes(value) for value in messages(body, 1)]
    parts = [np.zeros(0, np.float32 if kind == 2 else dtype)]
    for number, wire_type, value in fields(body):
        if number != 1:
            continue
        if kind == 2 and wire_type in (LENGTH_DELIMITED, FIXED32):  # packed, and one by one
            parts.append(np.frombuffer(value, "<f4"))
        elif kind == 3 and wire_type == LENGTH_DELIMITED:
            parts.append(parse_varints(value, dtype))
        elif kind == 3 and wire_type == VARINT:
            parts.append(np.array([value], np.uint64).view(np.int64).astype(dtype))
        else:
            raise ValueError(f"a number of wire type {wire_type}; not a proto of tf.train.Example")
    return np.concatenate(parts)


def messages(message: memoryview, wanted: int) -> list[memoryview]:
    """The values of one field, which are messages, strings or bytes; other fields are skipped."""
    found = []
    for number, wire_type, value in fields(message):
        if number == wanted:
            if wire_type != LENGTH_DELIMITED:
                raise ValueError(f"field {number} of wire type {wire_type}; not a proto of tf.train.Example")
            found.append(value)
    return found


def fields(message: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Number, wire type and value of each field, in their order."""
    position = 0
    while position < len(message):
        tag, position = parse_varint(message, position)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == VARINT:
            value, position = parse_varint(message, position)
            yield number, wire_type, value
            continue
        if wire_type == LENGTH_DELIMITED:
            size, position = parse_varint(message, position)
        elif wire_type in (FIXED32, FIXED64):
            size = 4 if wire_type == FIXED32 else 8
        else:
            raise ValueError(f"a field of wire type {wire_type}; not a proto of tf.train.Example")
        if size > len(message) - position:
            raise ValueError(f"field {number} ends behind its message; not a proto of tf.train.Example")
        yield number, wire_type, message[position : position + size]
        position += size


def parse_varint(message: memoryview, position: int) -> tuple[int, int]:
    """An unsigned number of 7 bits a byte, the lowest first, and the position behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if position == len(message):
            break
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFFFFFFFFFFFFFF, position
    raise ValueError("a varint that does not end; not a proto of tf.train.Example")


def parse_varints(packed: memoryview, dtype: str = "int64") -> np.ndarray:
    """All varints of a packed field at once; negative ones lie in it as their two's complement, of 10 bytes."""
    octets = np.frombuffer(packed, np.uint8)
    parts = [np.zeros(0, dtype)]
    while len(octets):
        ends = np.flatnonzero(octets[:BLOCK_SIZE] < 0x80) + 1
        sizes = np.diff(ends, prepend=0)
        if not len(ends) or sizes.max() > 10:
            raise ValueError("a varint that does not end; not a proto of tf.train.Example")
        block, octets = octets[: ends[-1]], octets[ends[-1] :]
        starts = ends - sizes
        shifts = 7 * (np.arange(len(block)) - np.repeat(starts, sizes))
        bits = (block & 0x7F).astype(np.uint64) << shifts.astype(np.uint64)
        parts.append(np.add.reduceat(bits, starts).view(np.int64).astype(dtype))
    return np.concatenate(parts)


Example = dict[str, memoryview]  # encoded values by path, see `hlrp.tfrecord.parse_example`
NUMBERS = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 float32 float64".split()


class Feature(NamedTuple):
    kind: str  # tensor, image, text, classLabel; or another, which is not read
    dtype: str
    shape: tuple[int, ...]  # -1 where it varies
    encoding: str  # of tensors: none, bytes, zlib
    depth: int  # sequences that it lies in: 0 of an episode, 1 of its steps


def read_features(uri: str, tree: dict) -> dict[str, Feature]:
    """The features by their paths, from features.json (tensorflow_datasets/core/proto/feature.proto)."""
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
            dtype = {"text": "string", "classLabel": "int64"}.get(kind, what.get("dtype", ""))
            features[path] = Feature(kind, dtype, shape, what.get("encoding", "none").lower(), depth)

    if "featuresDict" not in tree:
        raise ValueError(f"{uri}: features.json of an unknown form; that of tensorflow_datasets 4.5 or later fits")
    walk(tree, "", 0)
    return features


def read_strings(example: Example, path: str) -> list[bytes]:
    """The values of a feature that are bytes: one, or one a step."""
    values = parse_feature(encoded(example, path))
    if isinstance(values, np.ndarray):
        raise ValueError(f"{path} has numbers, but bytes by features.json")
    return values


def read_tensor(example: Example, path: str, feature: Feature) -> np.ndarray:
    """The values of a feature that are numbers: (*shape), or (t, *shape) where it lies in the steps."""
    is_float = "float" in feature.dtype
    if feature.encoding == "none":
        values = parse_feature(encoded(example, path), "int64" if is_float else feature.dtype)
        if len(values) and (isinstance(values, list) or is_float != (values.dtype == np.float32)):
            raise ValueError(f"{path} has other values than {feature.dtype}, which it has by features.json")
        values = np.asarray(values, feature.dtype)
    else:
        unpack = zlib.decompress if feature.encoding == "zlib" else bytes
        try:
            arrays = [unpack(array) for array in read_strings(example, path)]
        except zlib.error as error:
            raise ValueError(f"{path} is no zlib stream: {error}") from error
        values = np.frombuffer(b"".join(arrays), feature.dtype)
    if len(values) % math.prod(feature.shape) or not feature.depth and len(values) != math.prod(feature.shape):
        raise ValueError(f"{path} has {len(values)} numbers, which {list(feature.shape)} does not divide")
    return values.reshape((-1, *feature.shape) if feature.depth else feature.shape)


def encoded(example: Example, path: str) -> memoryview:
    if path not in example:
        raise ValueError(f"{path} is missing")
    return example[path]
