"""The lines are numbered, so that whoever reads the log knows whether one is missing."""

import argparse
import os
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("--lines", type=int)
parser.add_argument("--until")
options = parser.parse_args()
sys.stdout.write("".join(f"line {number}\n" for number in range(options.lines)))
sys.stdout.flush()
while not os.path.exists(options.until):
    time.sleep(0.1)
sys.stdout.write("the last line, without an end")
