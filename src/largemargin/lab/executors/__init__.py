"""Where runs are done: processes of this machine, or a Ray cluster. What is to be done, and again, is decided by ``lab.queue``."""

EXECUTORS = ("local", "ray")
