"""Attaches to a process (first argument) with the engine at a socket (the second); says when it begins."""

import sys
from pathlib import Path

from udedup.attach.process import Process
from udedup.attach.session import Session
from udedup.commands.host import agent_library

process = Process(int(sys.argv[1]))
session = Session(process, agent_library())
print("ready", flush=True)
session.attach(Path(sys.argv[2]), None, 0)
