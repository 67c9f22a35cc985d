"""Ranks of a run: what the environment says of this process, and small facts agreed on by all."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anchor_cli.base.errors import InputError

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


def environment_ranks() -> tuple[int, int, int] | None:
    """(rank, local rank, world size) from torchrun's, DeepSpeed's or SLURM's environment; None: started by hand."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), int(env["WORLD_SIZE"])
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID", 0)), int(env["SLURM_NTASKS"])
    return None


def complete_rendezvous() -> None:
    """Fill in MASTER_ADDR and MASTER_PORT where SLURM or a start by hand leave them out.

    Raises:
        InputError: several processes and nothing says where they meet.
    """
    env = os.environ
    ranks = environment_ranks()
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return  # torchrun's own store, which its agent serves at these very variables, for one process, too
    if ranks is None or ranks[2] == 1:
        env.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))  # whatever is set: it meets nobody
        return
    address = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", ""))
    if not address:
        raise InputError(
            "MASTER_ADDR is not set, so the processes cannot find each other",
            hint="export MASTER_ADDR (host of rank 0) and MASTER_PORT (one that is free there) before srun",
        )
    env["MASTER_ADDR"] = address
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", 0)) % 20000))


def first_host(nodes: str) -> str:
    """The first host of SLURM's list (`gpu[03-05,09],login1` is gpu03, …), where task 0 is; empty for an empty one.

    Not SLURM_LAUNCH_NODE_IPADDR: that is where `srun` was typed, a login node maybe.
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def as_node() -> tuple[int, int] | None:
    """(rank, count) of this node where the environment counts nodes and not processes; else None.

    Kubernetes' PyTorchJob and the like set RANK and WORLD_SIZE for each pod and no LOCAL_RANK; SLURM may be asked for
    one task a node. Such a process starts the workers of its node, if it has several GPUs or is told a number.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return None if "LOCAL_RANK" in env else (int(env["RANK"]), int(env["WORLD_SIZE"]))
    ranks = environment_ranks()
    if ranks is not None and env.get("SLURM_NNODES", env.get("SLURM_JOB_NUM_NODES")) == str(ranks[2]):
        return ranks[0], ranks[2]
    return None


def threads_each(num_processes: int) -> str:
    return str(max(1, (os.cpu_count() or 1) // num_processes))


def free_port() -> int:
    """A TCP port of this host that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Ranks:
    """This process among all. `cpu_group` is a gloo group for small facts that must not touch a GPU; None alone."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None

    def broadcast(self, value: Any, source: int = 0) -> Any:
        """The source rank's `value`, anything JSON can say, on every rank (no pickle)."""
        if self.world_size == 1:
            return value
        import torch
        import torch.distributed as dist

        text = json.dumps(value).encode() if self.rank == source else b""
        length = torch.tensor([len(text)])
        dist.broadcast(length, source, group=self.cpu_group)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8)
        if self.rank == source:
            buffer.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        dist.broadcast(buffer, source, group=self.cpu_group)
        return json.loads(bytes(buffer.tolist()))

    def first_text(self, text: str | None) -> str | None:
        """The text of the lowest rank that has one, on every rank; None where nobody has."""
        if self.world_size == 1:
            return text
        import torch
        import torch.distributed as dist

        who = torch.tensor([self.rank if text else self.world_size])
        dist.all_reduce(who, op=dist.ReduceOp.MIN, group=self.cpu_group)
        first: str | None = None if who.item() == self.world_size else self.broadcast(text, int(who.item()))
        return first

    def barrier(self) -> None:
        if self.world_size > 1:
            import torch.distributed as dist

            dist.barrier(group=self.cpu_group)

    @contextmanager
    def refuse_together(self) -> Iterator[None]:
        """What any rank refuses inside the block, all refuse at its end, in the words of the lowest of them."""
        refusal: InputError | None = None
        try:
            yield
        except InputError as error:
            refusal = error
        except OSError as error:
            refusal = InputError(f"{error.filename or 'start-up'}: {error.strerror or error}", "check path and rights")
        text = self.first_text(str(refusal) if refusal else None)
        if text is not None:
            message, _, hint = text.partition("\n")
            raise InputError(message, hint or None) from refusal
