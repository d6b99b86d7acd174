"""The zoo's models cut to their first two blocks, so that experiments take little time."""

from __future__ import annotations

import pytest

from actkit import zoo


@pytest.fixture(scope="session")
def language():
    model = zoo.load("swiglu")
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    return model


@pytest.fixture(scope="session")
def sentences():
    model = zoo.load("minilm")
    model.encoder.layer = model.encoder.layer[:2]
    model.config.num_hidden_layers = 2
    return model
