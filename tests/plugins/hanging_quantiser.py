"""A quantising process that says how far it is, over and over, and never goes on."""

import threading

SAID_EVERY_S = 0.05

if __name__ == "__main__":
    while not threading.Event().wait(SAID_EVERY_S):
        print('{"done": 1, "total": 2}', flush=True)
