"""Runs a training call in forked children and kills them; its own process, because autograd does not survive a fork.

python -m tests.nitrofusion.kills CONFIG.json NUM_KILLS
"""

import json
import os
import random
import signal
import sys
import time

import torch

from nitrofusion.config import TrainConfig
from nitrofusion.train import train


def main(path: str, num_kills: int) -> None:
    torch.set_num_threads(1)
    with open(path) as file:
        config = TrainConfig.from_json(json.load(file))
    import nitrofusion.train.loop  # noqa: F401  warm: children start at once

    rng = random.Random(os.getpid())
    kills = deaths = 0
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        child = os.fork()
        if child == 0:
            try:
                train(config)
            except BaseException as error:
                print(repr(error), file=sys.stderr)
                os._exit(9)
            os._exit(0)
        if kills < num_kills:
            time.sleep(rng.uniform(0.05, 1.6))
            os.kill(child, signal.SIGKILL)
            kills += 1
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            deaths += 1
        elif code:
            sys.exit(f"a resumed run failed with {code} after {kills} kills")
        elif kills >= num_kills:
            print(json.dumps({"kills": kills, "deaths": deaths}))
            return
    sys.exit("the run did not get on between kills")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
