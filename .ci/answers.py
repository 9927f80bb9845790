"python answers.py ADDRESS: exit code 0 if a server answers there within three seconds, else 1"
import os
import sys
import threading
from urllib.request import Request, urlopen


def ask():
    try: urlopen(Request(sys.argv[1], method="HEAD"), timeout=3).close()
    except Exception: os._exit(1)
    os._exit(0)


# urlopen's limit holds for each step of a connection, and not for looking up a name: a thread
# can be left behind whatever it waits for.
threading.Thread(target=ask, daemon=True).start()
threading.Event().wait(3)
os._exit(1)
