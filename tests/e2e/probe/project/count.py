import argparse
import json
import time

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
parser.add_argument("--pause", type=float)
options = parser.parse_args()
for step in range(1, options.steps + 1):
    print(json.dumps({"step": step, "loss": 1 / step}), flush=True)
    time.sleep(options.pause)
