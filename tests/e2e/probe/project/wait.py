import time

print("ready", flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    with open("/valohai/outputs/saved.txt", "w") as file:
        file.write("in time")
    print("saved what there was", flush=True)
