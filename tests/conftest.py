import os

# One thread a process: the tests run in two processes, and threads that wait for each other on a busy machine are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
