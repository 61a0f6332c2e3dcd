"""How many processes a run has on a cluster, and what each of them is given of it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from lossmith.errors import RecipeError, RunError

__all__ = ["Placement", "Rooms", "connected", "import_ray", "rooms"]

PATIENCE = 60  # seconds until the cluster has to have found room
_PASSED_ON = ("PYTHONPATH", "LOSSMITH_CACHE", "LOSSMITH_VLLM", "HF_HOME", "HF_HUB_OFFLINE", "VLLM_")  # begin so


@dataclass(frozen=True)
class Placement:
    """Processes of a run. Of GPUs, where the cluster has any, each sampler and each learner gets one."""

    samplers: int = 1  # write completions, each with its own copy of the policy
    scorers: int = 1
    learners: int = 1  # ranks that share the update (docs/many-processes.md)

    def __post_init__(self) -> None:
        for name in ("samplers", "scorers", "learners"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} = {getattr(self, name)}: a run on a cluster has at least one of each.")

    @property
    def heavy(self) -> int:
        """Processes that hold the model."""
        return self.samplers + self.learners


@dataclass(frozen=True)
class Rooms:
    """A place for each process: options for Ray's `remote`."""

    learners: list[dict[str, Any]]
    samplers: list[dict[str, Any]]
    scorers: list[dict[str, Any]]


def import_ray() -> Any:
    """Ray. RunError: it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise RunError("a cluster is run by Ray, which is not installed here: pip install 'lossmith[ray]'")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a process without GPUs of its own hides none
    import ray

    return ray


@contextlib.contextmanager
def connected(placement: Placement) -> Iterator[None]:
    """Within it, a cluster: that of RAY_ADDRESS, or one of this machine, which ends with the block."""
    ray = import_ray()
    size: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:  # on a laptop, processes share what cores there are
        size = {"address": "local", "num_cpus": max(os.cpu_count() or 1, placement.heavy + placement.scorers)}
    try:
        ray.init(
            log_to_driver=False, include_dashboard=False, configure_logging=False, ignore_reinit_error=False, **size
        )
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError) as error:
        there = " Is it up, and RAY_AUTH_MODE what it was started with?" if "RAY_ADDRESS" in os.environ else ""
        raise RunError(f"no Ray cluster: {error}.{there}") from None
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def rooms(placement: Placement) -> Iterator[Rooms]:
    """Room for every process of the run, all at once or not at all. RunError: the cluster has too little."""
    ray = import_ray()
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    if 0 < gpus < placement.heavy:
        raise RunError(
            f"{placement.samplers} samplers and {placement.learners} learners need {placement.heavy} GPUs, and the "
            f"cluster has {gpus}. Ask for fewer, or add machines."
        )
    heavy = {"CPU": 1.0} | ({"GPU": 1.0} if gpus else {})
    bundles = [heavy] * placement.heavy + [{"CPU": 1.0}] * placement.scorers
    group = placement_group(bundles, strategy="PACK")
    if not group.wait(PATIENCE):
        remove_placement_group(group)
        raise RunError(
            f"the cluster has no room for {len(bundles)} processes, each with a core of its own (it has "
            f"{there.get('CPU', 0):g}), within {PATIENCE} s. Ask for fewer samplers or scorers, or wait for other work."
        )
    variables = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    variables["OMP_NUM_THREADS"] = str(1 if gpus else max(1, (os.cpu_count() or 1) // placement.heavy))
    variables.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else every server is bound to the same cores

    def room(bundle: int) -> dict[str, Any]:
        return {
            "num_cpus": 1, "num_gpus": int(bundles[bundle].get("GPU", 0)), "runtime_env": {"env_vars": variables},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        }  # fmt: skip

    places = [room(bundle) for bundle in range(len(bundles))]
    try:
        yield Rooms(
            places[: placement.learners], places[placement.learners : placement.heavy], places[placement.heavy :]
        )
    finally:
        remove_placement_group(group)
