"""A run whose samplers, scorers and learner are processes of a Ray cluster. The loop is the one of `training`."""

from lossmith.cluster.placement import Placement
from lossmith.cluster.supervisor import ClusterRun, supervise

__all__ = ["ClusterRun", "Placement", "supervise"]
