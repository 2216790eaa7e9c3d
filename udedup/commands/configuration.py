"""From the options of ``udedup engine`` to what an engine takes."""

import argparse
from pathlib import Path

from udedup.engine.advisor import ScanTimeTarget
from udedup.engine.config import EngineConfig
from udedup.engine.service import Service


def engine_config(chosen: argparse.Namespace, service: Service) -> EngineConfig:
    """Returns the configuration that the command line and the file together say."""
    advisor = ScanTimeTarget(
        seconds=chosen.advisor_target_scan_time,
        max_cpu=chosen.advisor_max_cpu,
        min_pages_to_scan=chosen.advisor_min_pages_to_scan,
        max_pages_to_scan=chosen.advisor_max_pages_to_scan,
    )
    return EngineConfig(
        socket=service.socket_path or chosen.socket.absolute(),
        socket_mode=chosen.socket_mode,
        socket_group=chosen.socket_group,
        mount=None if chosen.mount is None else chosen.mount.absolute(),
        images=tuple(chosen.image),
        allow_other=chosen.allow_other,
        image_format=chosen.image_format,
        secret_file=None if chosen.secret_file is None else chosen.secret_file.absolute(),
        allow_backing=tuple(directory.absolute() for directory in chosen.allow_backing),
        state_dir=chosen.state_dir.absolute(),
        policy=chosen.policy,
        pages_to_scan=chosen.pages_to_scan,
        sleep_millisecs=chosen.sleep_millisecs,
        advisor=advisor if chosen.advisor_mode == "scan-time" else None,
        hint_runs=chosen.hint_ratio[0],
        scan_runs=chosen.hint_ratio[1],
        smart_scan=chosen.smart_scan,
        zero_pages=chosen.zero_pages,
        hint_slots=chosen.hint_slots,
        huge_page_threshold=chosen.huge_page_threshold,
        quiet_breaks=chosen.quiet_breaks,
        holdoff_millisecs=chosen.holdoff_millisecs,
        allowed_domains=frozenset(chosen.allow_domain),
        shared_domains=frozenset(chosen.shared_domain),
        agents_max=chosen.agents_max,
        answer_seconds=chosen.answer_seconds,
        retire_seconds=chosen.retire_seconds,
        metrics=chosen.metrics.absolute() if isinstance(chosen.metrics, Path) else chosen.metrics,
        metrics_group=chosen.metrics_group,
        map_count=chosen.max_map_count,
        pressure_files=() if chosen.pressure == "off" else None,
        drop_privileges=True,
        service=service,
    )
