"""The features of a data set that TensorFlow Datasets wrote: their types, from features.json, and their values.

The values of a record lie in a flat tf.train.Example under the paths of their features, such as
steps/observation/image, those of all steps one after another (tensorflow_datasets/core/example_serializer.py):
    images     as they are encoded                          bytes_list
    text       UTF-8                                        bytes_list
    tensors    float64 as float32, bool and uint8 as int64  float_list, int64_list
               of encoding zlib or bytes: an array a step   bytes_list
Sequences within a step, which lie elsewhere, are not read.
"""

import math
import zlib
from typing import NamedTuple

import numpy as np

from hlrp.tfrecord import parse_feature

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
