"""TensorBoard event files of a job, written where the job is coordinated, by the tensorboard package without torch."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from fl.errors import RecipeUnusable
from fl.jobs.progress import JobEvent


class TensorBoardTracking:
    """Writes the mean metrics of each round, each site's own, and what scripts log."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise RecipeUnusable(
                "TensorBoard is not installed", where="tracking_type", do="pip install 'sealwright[tracking]'"
            ) from error
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))
        self._lock = threading.Lock()

    def observe(self, event: JobEvent) -> None:
        """Take one event into account."""
        prefix = {"aggregated": "global", "update": f"site/{event.site}", "value": f"site/{event.site}"}.get(event.kind)
        if prefix is None or event.round is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=f"{prefix}/{name}", simple_value=number) for name, number in event.values.items()]
        if values:
            with self._lock:
                self._writer.add_event(Event(wall_time=time.time(), step=event.round, summary=Summary(value=values)))

    def close(self) -> None:
        """Write what is left and end the files."""
        self._writer.close()
