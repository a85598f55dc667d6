"""When something was logged, from a run's TensorBoard events: what Tune and metrics.json tell of times is rounded or summed up."""

from pathlib import Path

from tensorboardX.proto.event_pb2 import Event


def event_times(folder: Path, tag: str) -> list[float]:
    """Seconds since 1970 of each value under `tag`, in order."""
    found = []
    for file in sorted(folder.glob("events*")):
        data, place = file.read_bytes(), 0
        while place < len(data):
            size = int.from_bytes(data[place : place + 8], "little")  # of an event, between two checksums of 4 bytes
            event = Event.FromString(data[place + 12 : place + 12 + size])
            found += [event.wall_time for value in event.summary.value if value.tag == tag]
            place += size + 16
    return sorted(found)
