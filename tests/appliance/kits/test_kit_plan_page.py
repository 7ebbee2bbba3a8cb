"""The plan that the kits' page shows is one that is read."""

from __future__ import annotations

import re
from pathlib import Path

from appliance.kits.plan import read_plan

PAGE = Path(__file__).resolve().parents[3] / "docs/reference/kits.md"


def test_the_plan_of_the_page_is_read_with_every_part() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    plan = read_plan(text.encode(), "kits.md")
    assert [guest.role for guest in plan.guests] == ["server", "site"]
    assert (len(plan.images), len(plan.brokers), len(plan.users), len(plan.hosts)) == (1, 1, 1, 1)
    assert plan.users[0].granted() == ("submit", "operate", "view", "download")
