import json
import os
import sys

secret = os.environ["PROBE_TOKEN"]
print(f"the token is {secret}")
print(f"and again: {secret}", file=sys.stderr)
print(json.dumps({"token": secret, "length": len(secret)}))
with open("/valohai/outputs/length.txt", "w") as file:
    file.write(str(len(secret)))
