"""A plan for the demonstration's consortium: its server, its two sites and one reader."""

from __future__ import annotations

from appliance.demo.setting import (
    IMAGE,
    MODEL_KEY,
    OWNER,
    PRODUCTS,
    SERVER,
    SITES,
    Setting,
    data_key,
    member_of,
    vcpu_model,
)
from appliance.kits.plan import Plan, PlannedGuest, PlannedImage, PlannedUser


def plan_of(setting: Setting) -> Plan:
    server = PlannedGuest(
        role="server",
        name=SERVER,
        member=OWNER,
        image=IMAGE,
        vcpu_model=vcpu_model(PRODUCTS[SERVER]),
        listen=setting.server_address,
        address=setting.server_address,
        resources={"model": MODEL_KEY},
    )
    sites = tuple(
        PlannedGuest(
            role="site",
            name=site,
            member=member_of(site),
            image=IMAGE,
            vcpu_model=vcpu_model(PRODUCTS[site]),
            server=SERVER,
            disks=("data",),
            resources={"data": data_key(site)},
        )
        for site in SITES
    )
    user = PlannedUser(name="reader", member=OWNER, server=SERVER, request="reader/request.json", rights="member")
    image = PlannedImage(name=IMAGE, folder="image", source="the builder's release page")
    return Plan(images=(image,), guests=(server, *sites), users=(user,))
