"""What torchrun starts as a rank in tests/support/nodes.py: it has one forked, and stands for it.

`forked_rank.py SOCKET ARGUMENT ...`, with no import that takes long. It hands its streams,
environment and folder to the driver at SOCKET, which forks a rank that has everything imported;
passes on to that what torchrun asks of it, and ends as that ends. Where it is killed, the driver
kills the rank.
"""

import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX) as driver:
    driver.connect(sys.argv[1])
    order = {"argv": sys.argv[2:], "folder": os.getcwd(), "environment": dict(os.environ)}
    socket.send_fds(driver, [json.dumps(order).encode() + b"\n"], [1, 2])

    def pass_on(number, _frame):
        driver.sendall(b"%d\n" % number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    answer = driver.recv(20)
    while answer and not answer.endswith(b"\n"):
        answer += driver.recv(20)
    code = int(answer or -signal.SIGKILL)
    if code < 0:
        signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
        os.kill(os.getpid(), -code)
    os._exit(code)
