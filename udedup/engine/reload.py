"""New settings for an engine that runs: what can change does, and what can't is said in one line and left.

Rates, images and limits take effect at once; what a program is told when it joins (``JOINING``), with the next to join.
A program that the new rules of the domains would not have let into the domain it is in is let go, and may join again:
what it shares stays merged where it is, and nothing new merges with that.
"""

import logging
from collections.abc import AsyncIterable
from contextlib import suppress
from typing import TYPE_CHECKING

import attrs

from udedup.engine.config import EngineConfig
from udedup.engine.wire import AgentError
from udedup.errors import UdedupError

if TYPE_CHECKING:
    from udedup.engine.scheduler import Scheduler
    from udedup.engine.server import Engine

log = logging.getLogger(__name__)

RATES = frozenset({"pages_to_scan", "sleep_millisecs", "advisor"})
DOMAINS = frozenset({"allowed_domains", "shared_domains"})
OPENING = frozenset({"image_format", "secret_file"})
"""How images are opened that are added from then on."""
JOINING = frozenset({"answer_seconds", "holdoff_millisecs"})
CHANGEABLE = RATES | DOMAINS | OPENING | JOINING | {"agents_max", "images"}
"""Fields of EngineConfig that :func:`apply` can change."""

OPTIONS = {
    "advisor": "advisor-*",
    "hint_runs": "hint-ratio",
    "scan_runs": "hint-ratio",
    "images": "image",
    "map_count": "max-map-count",
    "pressure_files": "pressure",
    "allowed_domains": "allow-domain",
    "shared_domains": "shared-domain",
}
"""Names of options that aren't those of the fields."""


def option(field: str) -> str:
    """The option that sets a field of EngineConfig."""
    return OPTIONS.get(field) or field.replace("_", "-")


def differences(old: EngineConfig, new: EngineConfig) -> set[str]:
    """Names of the fields that differ."""
    names = (field.name for field in attrs.fields(EngineConfig))
    return {name for name in names if getattr(old, name) != getattr(new, name)}


async def follow(configs: AsyncIterable[EngineConfig], engine: "Engine", scheduler: "Scheduler") -> None:
    """Applies one after the other, until there are no more."""
    async for config in configs:
        with engine.config.service.reloading():
            try:
                await apply(config, engine, scheduler)
            except UdedupError as error:
                log.warning("settings stay as they are: %s", error)


async def apply(new: EngineConfig, engine: "Engine", scheduler: "Scheduler") -> None:
    """Changes what can be changed. Raises UdedupError if ``new`` can't work; then all is as before."""
    new.check()
    old = engine.config
    changed = differences(old, new)
    engine.config = attrs.evolve(old, **{name: getattr(new, name) for name in CHANGEABLE})
    try:
        # A rate may be right beside the fixed settings of another file only.
        engine.config.check()
    except UdedupError:
        engine.config = old
        raise
    if fixed := sorted({option(name) for name in changed - CHANGEABLE}):
        log.warning("can't change while the engine runs, left as they are: %s", ", ".join(fixed))
    if changed & RATES:
        engine.change_rate()
        scheduler.change(engine.pace, sleep_millisecs=new.sleep_millisecs)
    if changed & DOMAINS:
        _change_domains(engine)
    if "agents_max" in changed:
        engine.change_agents_max()
    if "images" in changed:
        await _change_images(old, engine)
    if done := sorted({option(name) for name in changed & CHANGEABLE}):
        log.info("settings changed: %s", ", ".join(done))


def _change_domains(engine: "Engine") -> None:
    engine.change_domains()
    for agent in engine.agents:
        key = None
        with suppress(AgentError):
            key = engine.rules.key(agent.peer.uid, agent.domain.label, agent.number)
        if key != agent.domain.key:
            agent.fail(AgentError("the settings no longer put it into its domain"))


async def _change_images(old: EngineConfig, engine: "Engine") -> None:
    """Shows those that are new; who knows whether one that is no longer named is in use?"""
    failed = set()
    for name, path in engine.config.images:
        shown = [image for image in engine.images or () if image.path == path and name in (None, image.name)]
        if not shown:
            try:
                await engine.add_image(path, name)
            except UdedupError as error:
                log.warning("%s", error)
                failed.add((name, path))
    # The next reload tries those again.
    images = tuple(image for image in engine.config.images if image not in failed)
    engine.config = attrs.evolve(engine.config, images=images)
    gone = [path for name, path in old.images if (name, path) not in engine.config.images]
    still = [image.name for image in engine.images or () if image.path in gone]
    if still:
        log.warning("no longer named, but still shown: %s; `udedup umount` takes images out", ", ".join(sorted(still)))
