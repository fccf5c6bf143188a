"""Machines that are made up, for plans."""

from dataclasses import replace

import torch

from gfwsvd.footprint import Settings
from gfwsvd.hardware import Curve, Hardware
from tiny_models import random_tokens

GIB = 1 << 30
POWERS = {"move": 1.0, "thin float32": 2.0, "fold": 2.0, "symmetrize": 2.0}
NAMES = ("matmul float32", "matmul float64", "cholesky", "eigh", "qr", "lu", "solve", "gram", *POWERS)
# A machine that does everything at a rate of its own, whatever the size
MACHINE = Hardware(
    device="cpu",
    name="made up",
    curves={name: Curve(((1.0, 1e-9),), POWERS.get(name, 3.0)) for name in NAMES},
    disk_read=1e9,
    disk_write=1e9,
    digest=1e9,
    device_memory=GIB,
    host_memory=GIB,
    disk=GIB,
)
CURVES = {**MACHINE.curves} | {f"{kind} bfloat16": MACHINE.curves[f"{kind} float32"] for kind in ("matmul", "thin")}
GPU = replace(MACHINE, device="cuda")
SETTINGS = Settings(sequences=16, seq_len=16, batch_size=4)


def batches(settings: Settings) -> list[dict[str, torch.Tensor]]:
    ids = random_tokens(settings.sequences, settings.seq_len)
    return [{"input_ids": part} for part in ids.split(settings.batch_size)]
