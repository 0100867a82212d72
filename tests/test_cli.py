"""What `chunkft` does before any recipe."""

import os
import subprocess
import sys

TOLD = """
from chunkft.cli import main
assert main(["plan", "no-such-model"]) == 2
from huggingface_hub import constants
print(constants.HF_HUB_DISABLE_TELEMETRY)
"""


def test_trl_tells_its_makers_nothing():
    """Its ping is off before the hub's library reads the setting."""
    env = {key: value for key, value in os.environ.items() if "TELEMETRY" not in key}
    env.pop("DO_NOT_TRACK", None)
    told = subprocess.run(
        [sys.executable, "-c", TOLD], env=env, text=True, capture_output=True, check=True
    )
    assert told.stdout.split()[-1] == "True", told.stderr
