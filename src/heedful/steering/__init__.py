"""Steering: attention edited at inference. Nothing is trained.

`AttentionCalibration` (ACT) moves attention away from late sinks; `search_heads` finds the heads where that helps;
`sink_map` shows where the sinks are.
"""

from heedful.steering.act import AttentionCalibration, calibrate_outputs, calibrate_probabilities
from heedful.steering.head_search import HeadSet, mean_score, search_heads
from heedful.steering.sinks import Sink, SinkMap, sink_map

__all__ = [
    "AttentionCalibration",
    "HeadSet",
    "Sink",
    "SinkMap",
    "calibrate_outputs",
    "calibrate_probabilities",
    "mean_score",
    "search_heads",
    "sink_map",
]
