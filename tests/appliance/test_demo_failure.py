"""When a step of the demonstration fails, its own reason is told, not the end of the processes that it started."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from appliance.demo import story
from appliance.demo.display import Display
from appliance.processes import Processes
from policies.errors import Refused


def test_a_failed_step_is_told_by_its_own_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path, processes: Processes, *_: Any) -> None:
        processes.start("sleeper", [sys.executable, "-c", "import time; time.sleep(60)"])
        raise Refused("the owner changed its mind", where="story", do="Ask again.")

    monkeypatch.setattr(story, "_tell", fails)
    with pytest.raises(Refused, match="the owner changed its mind"):
        story.run_demo(tmp_path / "demo", Display())
