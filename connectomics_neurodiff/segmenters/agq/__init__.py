"""AGQ: neuron masks from affinity-guided queries."""

from .network import AGQ, InstancePrediction

__all__ = ["AGQ", "InstancePrediction"]
