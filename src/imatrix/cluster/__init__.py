"""Collecting on many machines with Dask."""

from __future__ import annotations

from imatrix.cluster.cluster import Cluster, ClusterUse

__all__ = ["Cluster", "ClusterUse"]
