"""For every test."""

import signal

import pytest
import torch

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts `pytest &` deaf to Ctrl-C


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # small products are slower on two, and far slower where the cores are shared
