"""Prints the peak of a rehearsed step in bytes: `python -m gpu_sections.rehearse_peak`, a config as
JSON on standard input.

A process of its own, because a torch without CUDA must be given the name of a device before it is
imported.
"""

from __future__ import annotations

import json
import sys

from k2train.config.convert import from_dict
from k2train.config.schema import Config
from k2train.rehearsal.stub import load_stub


def main() -> None:
    config = from_dict(Config, json.load(sys.stdin))
    load_stub()
    from k2train.rehearsal.run import rehearse

    rehearsal = rehearse(config)
    print(max(rehearsal.pipeline_peak.num_bytes, rehearsal.update_peak.num_bytes))


if __name__ == "__main__":
    main()
