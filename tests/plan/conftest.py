"""The tiny corpus of the tests of launching."""

from launch.conftest import tiny

__all__ = ["tiny"]
