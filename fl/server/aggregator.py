"""A job's own aggregator at the server: the bundle's script in a sandbox, with neither data nor network."""

from __future__ import annotations

from typing import Final

from fl.aggregation.custom import NAME, ScriptAggregation
from fl.guard.sandbox import Sandbox
from fl.jobs.bundle import Bundle
from fl.site.script import END_SECONDS, ScriptSession
from fl.transport.local import ScriptSocket
from policies.errors import Unusable

REPORT_SECONDS: Final = 5.0


class SandboxedAggregation(ScriptAggregation):
    """The aggregator of a bundle, for as long as its job needs one."""

    def __init__(self, bundle: Bundle, job: str) -> None:
        """Start the script. Raises SandboxFailed, SandboxUnusable, ScriptFailed; Unusable if the job has none."""
        script = bundle.settings.aggregator
        if script is None:
            raise Unusable("the job has no aggregator", where=job, do="Name one in the recipe.")
        ours, theirs = ScriptSocket.pair()
        with theirs:
            self._process = Sandbox(bundle.files, script).start(theirs)
        session = ScriptSession(ours, site=NAME, how_it_ended=self._how_it_ended)
        super().__init__(session, bundle.settings, job)

    def close(self) -> None:
        """End the script, and whatever it has started."""
        with self._process:
            super().close()
            self._process.wait(END_SECONDS)

    def _how_it_ended(self) -> str:
        outcome = self._process.wait(REPORT_SECONDS)
        return "closed its connection to the job" if outcome is None else outcome.sentence
