"""Available memory of the machine or the container."""

from __future__ import annotations

import os
import re
from pathlib import Path


def available_bytes() -> int:
    """Bytes of memory that are still available: the lower of the machine's and the container's limit."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    if match is not None:
        available = int(match[1]) << 10
    else:
        available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except OSError:
        return available
    if limit.isdigit() and used.isdigit():
        # The container's figure includes unused file pages, which the kernel frees when memory is needed.
        available = min(available, int(limit) - int(used) + (int(stat[1]) if stat else 0))
    return available
