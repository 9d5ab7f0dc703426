"""Whole runs through the command line on a small corpus: processes, metrics, checkpoints, going on."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from megatron_lcl import load_model
from megatron_lcl.train import checkpoint
