"""For all tests."""

import signal

# A shell starts background jobs with Ctrl-C ignored, and some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
