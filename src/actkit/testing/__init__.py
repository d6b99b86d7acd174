"""Checks that methods must pass, and tiny models to run them on: for ours, and for anyone who writes one."""

from actkit.testing.analyses import check_analysis
from actkit.testing.checks import Check
from actkit.testing.functions import check_function
from actkit.testing.layers import check_layer
from actkit.testing.models import tiny_batches, tiny_model
from actkit.testing.own_models import check_model
from actkit.testing.rules import check_rule
from actkit.testing.runtimes import check_runtime
from actkit.testing.transforms import check_transform

__all__ = [
    "Check",
    "check_analysis",
    "check_function",
    "check_layer",
    "check_model",
    "check_rule",
    "check_runtime",
    "check_transform",
    "tiny_batches",
    "tiny_model",
]
