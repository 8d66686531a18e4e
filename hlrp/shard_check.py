"""What is wrong with a shard: every checksum, and the TAR against its index."""

from collections.abc import Iterator
from pathlib import Path

from hlrp.shard_index import ABSENT, SUFFIX, file_checksum, read_index
from hlrp.tars import read_samples


def faults(tar: Path) -> Iterator[str]:
    """A line for each fault, with file and member."""
    try:
        index = read_index(tar.with_suffix(SUFFIX))
    except ValueError as error:
        yield str(error)
        return
    for name in index.facts["checksums"]:
        try:
            index.table(name)
        except ValueError as error:
            yield str(error)
    if file_checksum(tar)[1] != index.facts["tar_checksum"]:
        yield f"{tar}: checksum of the whole file differs"

    frames = index.rows("frames", 0, int(index.lengths.sum()))
    members = [row for row in index.rows("members", 0, len(index.lengths)) if row != ABSENT]
    for number, row in enumerate(members + frames):
        try:
            index.read([row], lambda _, number=number: f"member {number}")
        except ValueError as error:
            yield str(error)

    expected = {start: size for start, size, _ in members + frames}
    try:
        with open(tar, "rb") as file:
            for sample in read_samples(file, str(tar), index.facts.get("ignore", ())):
                for member in sample.members.values():
                    if expected.pop(member.start, None) != len(member.data):
                        yield f"{tar}: {member.name}: not where the index has it"
    except ValueError as error:
        yield str(error)
        return
    for start in sorted(expected):
        yield f"{tar}: no member at byte {start}, where the index has one"
