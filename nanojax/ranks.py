"""Which process of a job this one is, found without importing jax, and how it meets the others.

Each value is taken from the first place that gives it: a flag, then jax's variables (JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES,
JAX_PROCESS_ID, JAX_LOCAL_DEVICE_IDS), then the first of these that started the process: Slurm's srun, Open MPI's mpirun, an indexed Job
of Kubernetes (its index alone: the other values are variables of the pod), SkyPilot. Where nothing says that there are several
processes, there is one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nanojax.checks import require_positive
from nanojax.errors import NanoJaxError, UserError
from nanojax.peers import ALONE, Peers

HEARTBEAT_S = 30  # after which a process that says nothing is dead; jax waits 100
SKYPILOT_PORT = 8476
HIGHEST_PORT = 2**16 - 1
PORTS = 2**12  # the highest of all: where jax puts coordinators of Slurm and Open MPI, by the number of the job


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process among several. The first four are None where there is one process only, and derived from the environment."""

    coordinator: str | None = None
    """host:port where process 0 of several listens, on a private network: whoever reaches it is trusted."""
    num_processes: int | None = None
    """Processes of the run, on all hosts."""
    process_id: int | None = None
    """Which of them this is, from 0."""
    local_devices: str | None = None
    """GPUs of this host that this process takes, as 0 or 0,1. Derived: all; one under Slurm and Open MPI."""
    coordinator_timeout: float = 300.0
    """Seconds to wait for the other processes at the start."""

    @property
    def several(self) -> bool:
        return (self.num_processes or 1) > 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return not self.process_id


def find(flags: Ranks, environ: Mapping[str, str] = os.environ) -> Ranks:
    """What flags and environment say together. Raises UserError, naming the flag or variable, on what cannot be."""
    where = cluster(environ)
    numbered = flags.process_id is None and "JAX_PROCESS_ID" not in environ  # else it is another's number that says which GPU
    found = replace(
        flags,
        coordinator=flags.coordinator or environ.get("JAX_COORDINATOR_ADDRESS") or where.coordinator,
        num_processes=first_of(flags.num_processes, whole("JAX_NUM_PROCESSES", environ), where.num_processes),
        process_id=first_of(flags.process_id, whole("JAX_PROCESS_ID", environ), where.process_id),
        local_devices=flags.local_devices or environ.get("JAX_LOCAL_DEVICE_IDS") or (where.local_devices if numbered else None),
    )
    check(found)
    return found if found.several else Ranks(local_devices=flags.local_devices or environ.get("JAX_LOCAL_DEVICE_IDS"))


def check(ranks: Ranks) -> None:
    """Raise UserError on values that do not go together."""
    address, count, process = ranks.coordinator, ranks.num_processes, ranks.process_id
    named = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[\w.-]+):([0-9]{1,5})", address or "host:1")
    if not named or not 0 < int(named[2]) <= HIGHEST_PORT:
        raise UserError(f"--coordinator takes host:port, given {address!r}; try {re.sub(':.*', '', address or '') or 'host'}:8476")
    if count is not None and count < 1:
        raise UserError(f"--num-processes must be at least 1, given {count}; leave it out for one process")
    if process is not None and not 0 <= process < (count or 1):
        given = f"--num-processes {count}" if count else "no --num-processes"
        raise UserError(f"--process-id counts from 0 to --num-processes - 1, given {process} and {given}; change one of them")
    if count is None and address is not None:
        raise UserError(f"--coordinator {address} goes with --num-processes and --process-id; give them, or leave it out for one process")
    if ranks.several and address is None:
        raise UserError(
            f"{count} processes need --coordinator host:port, where process 0 listens, given none; add it, or use nanojax launch"
        )
    if ranks.several and process is None:
        raise UserError(f"each of {count} processes needs its own --process-id, given none; add it, from 0 to {(count or 1) - 1}")
    devices = (ranks.local_devices or "0").split(",")
    if not all(re.fullmatch("[0-9]{1,4}", device) for device in devices) or len(set(devices)) < len(devices):
        raise UserError(f"--local-devices takes numbers of GPUs of this host, each once, given {ranks.local_devices!r}; try 0 or 0,1")
    require_positive("coordinator_timeout", ranks.coordinator_timeout)


def cluster(environ: Mapping[str, str]) -> Ranks:
    """What the program that started this process says, in the order of the table below."""
    for there, read in CLUSTERS:
        if all(name in environ for name in there):
            return read(environ)
    return Ranks()


def slurm(environ: Mapping[str, str]) -> Ranks:
    """A task of a step that srun started. The shell of a batch script is none."""
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"  # the latter is of the whole job in some shells
    head = re.match(r"([^,\[]+)(?:\[([^,\-\]]+))?", environ["SLURM_STEP_NODELIST"])
    host = "".join(filter(None, head.groups())) if head else environ["SLURM_STEP_NODELIST"]
    return Ranks(
        coordinator=f"{host}:{port_of(whole('SLURM_JOB_ID', environ) or 0)}" if host else None,
        num_processes=whole(tasks, environ),
        process_id=whole("SLURM_PROCID", environ),
        local_devices=own_device("SLURM_LOCALID", environ),
    )


def open_mpi(environ: Mapping[str, str]) -> Ranks:
    """A rank of mpirun. Open MPI 5 does not say where its first rank runs: there, --coordinator does."""
    uri = environ.get("OMPI_MCA_orte_hnp_uri", "")
    found = re.match(r"([0-9]+)\..*?(?:tcp://([^,:]+)|tcp6://\[([^,\]]+))", uri)
    host = found and (found[2] or f"[{found[3]}]")
    return Ranks(
        coordinator=f"{host}:{port_of(int(found[1]) // PORTS)}" if found else None,
        num_processes=whole("OMPI_COMM_WORLD_SIZE", environ),
        process_id=whole("OMPI_COMM_WORLD_RANK", environ),
        local_devices=own_device("OMPI_COMM_WORLD_LOCAL_RANK", environ),
    )


def kubernetes(environ: Mapping[str, str]) -> Ranks:
    """A pod of an indexed Job, if the pod's variables say that there are several processes."""
    return Ranks(process_id=whole("JOB_COMPLETION_INDEX", environ) if "JAX_NUM_PROCESSES" in environ else None)


def skypilot(environ: Mapping[str, str]) -> Ranks:
    """A node of SkyPilot, which takes all of its GPUs."""
    first = next(iter(environ["SKYPILOT_NODE_IPS"].split()), None)
    return Ranks(
        coordinator=f"{first}:{SKYPILOT_PORT}" if first else None,
        num_processes=whole("SKYPILOT_NUM_NODES", environ),
        process_id=whole("SKYPILOT_NODE_RANK", environ),
    )


CLUSTERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, str]], Ranks]], ...] = (
    (("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"), slurm),
    (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"), open_mpi),
    (("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"), kubernetes),
    (("SKYPILOT_NODE_IPS", "SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"), skypilot),
)


def own_device(name: str, environ: Mapping[str, str]) -> str | None:
    """One GPU for each process of a host, by its number there; None where the process was shown one GPU only, which is number 0."""
    shown = environ.get("CUDA_VISIBLE_DEVICES")
    local = whole(name, environ)
    return None if local is None or (shown is not None and len(shown.split(",")) == 1) else str(local)


def port_of(job: int) -> int:
    """A port that the processes of one job agree on, and most other jobs do not have."""
    return HIGHEST_PORT - PORTS + 1 + job % PORTS


def whole(name: str, environ: Mapping[str, str]) -> int | None:
    """A variable as a number, None where it is not set. Raises UserError naming it."""
    text = environ.get(name)
    if text is None or text == "":
        return None
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise UserError(f"the variable {name} must be a whole number from 0 on, given {text!r}; mend it, or unset it")
    return int(text)


def first_of(*values: Any) -> Any:
    """The first that is not None; None if there is none."""
    return next((value for value in values if value is not None), None)


def connect(ranks: Ranks, beside: Callable[[Callable[[], None], float], Any]) -> Peers:
    """Meet the other processes, before any device is touched. `beside(work, seconds)` runs what cannot be interrupted.

    Raises NanoJaxError, naming the address, where they do not come in time.
    """
    if not ranks.several and ranks.local_devices is None:
        return ALONE
    import jax

    if not ranks.several:
        jax.config.update("jax_cuda_visible_devices", ranks.local_devices)
        return ALONE
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    address, seconds = ranks.coordinator or "", ranks.coordinator_timeout
    own_host = re.match(r"(localhost|127\.|\[::1\])", address)

    def meet() -> None:
        jax.distributed.initialize(
            address,
            ranks.num_processes,
            ranks.process_id,
            local_device_ids=[int(device) for device in ranks.local_devices.split(",")] if ranks.local_devices else None,
            cluster_detection_method="deactivate",
            initialization_timeout=10 * int(seconds + 1),  # ours comes first: at its own, jax aborts the process without a word of ours
            heartbeat_timeout_seconds=HEARTBEAT_S,
            coordinator_bind_address=address if own_host else None,
        )

    try:
        beside(meet, seconds)
    except TimeoutError:
        who = "the other processes did not come to" if ranks.first else "process 0 does not answer at"
        raise NanoJaxError(
            f"{who} the coordinator {address} within {seconds:g} s; look whether all {ranks.num_processes} processes run and reach it, "
            "or give more --coordinator-timeout",
            abrupt=True,
        ) from None
    from jax._src.distributed import global_state  # jax's public names have no store

    return Peers(ranks.process_id or 0, ranks.num_processes or 1, global_state.client)
