"""The tiny model with its profile applied."""

from __future__ import annotations

import warnings

import pytest
import tiny
from watched import tuned_one

import sparvar_tune


@pytest.fixture
def applied():
    model = tiny.make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other weights than the profile's
        return model, sparvar_tune.apply(model, tuned_one())
