"""For every test: Ctrl-C means Ctrl-C. A shell's `pytest &` is started with SIGINT ignored, which a child inherits."""

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
