"""Landmark Attention as a layer, a cache with block retrieval, and a conversion of models people already have.

Read in this order: cache (what is kept, retrieved, and where it is put), module (a layer from scratch), convert.
"""

from heedful.layers.landmark.cache import LandmarkCache, LandmarkStep
from heedful.layers.landmark.convert import convert_to_landmark, load_landmark
from heedful.layers.landmark.module import LandmarkAttention

__all__ = ["LandmarkAttention", "LandmarkCache", "LandmarkStep", "convert_to_landmark", "load_landmark"]
