"""Run a command and write the most memory that it had resident, in bytes: `python peak.py FILE COMMAND...`

Linux counts what a process had before exec, too: a child of a large process would show its parent's size. This one is
small, so that what it starts shows its own.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

process = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGTERM, lambda *_: process.terminate())
_, status, usage = os.wait4(process.pid, 0)
Path(sys.argv[1]).write_text(str(usage.ru_maxrss * 1024))
sys.exit(os.waitstatus_to_exitcode(status))
